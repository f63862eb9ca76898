// Tensor names, configurations and patterns: refused with an io_error, or read, and then written under every naming
// that can express them and found again.
//
// An input is text: an adapter_config.json, an empty line, the metadata's configuration, an empty line, and one tensor
// a line, its name and its shape: `base_model.model.q.lora_A.weight 4 3`.
#include <mlkit/io/adapter_file.hpp>

#include <cstdint>
#include <string_view>

using namespace mlkit;

namespace {

void require(bool holds) {
  if (!holds) __builtin_trap();
}

std::string_view take_until(std::string_view& text, std::string_view separator) {
  const std::size_t at = std::min(text.find(separator), text.size());
  const std::string_view head = text.substr(0, at);
  text.remove_prefix(std::min(at + separator.size(), text.size()));
  return head;
}

std::vector<io::tensor_info> tensors_of(std::string_view text) {
  static const std::vector<std::byte> ones(1 << 16, std::byte{0x3c});
  std::vector<io::tensor_info> tensors;
  while (!text.empty()) {
    std::string_view line = take_until(text, "\n");
    io::tensor_info t;
    t.name = take_until(line, " ");
    index_t count = 1;
    while (!line.empty()) {
      index_t extent = 0;
      for (const char c : take_until(line, " ")) extent = (extent * 10 + (c & 15)) % 64;
      t.shape.push_back(extent);
      count *= extent;
      if (count > 4096) return tensors;
    }
    t.bytes = static_cast<std::size_t>(count) * 4;
    t.data = ones.data();
    tensors.push_back(std::move(t));
  }
  return tensors;
}

void write_again(const io::adapter_file& file) {
  for (const auto naming : {io::adapter_naming::peft, io::adapter_naming::diffusers, io::adapter_naming::diffusers_old,
                            io::adapter_naming::kohya})
    for (const io::adapter_entry& e : file.adapters) {
      std::vector<io::tensor_info> tensors;
      std::vector<std::byte> bytes;
      io::adapter_read_options options;
      try {
        io::detail::adapter_namer(naming, false).add(e, tensors);
        bytes = io::safetensors_bytes(tensors);
        if (naming == io::adapter_naming::peft) {
          options.config = io::parse_adapter_config(io::adapter_config_text(io::detail::config_of({}, {&e})));
        }
      } catch (const value_error&) {
        continue;  // not to be said under these names
      }
      const io::adapter_file again = io::parse_adapters(io::parse_safetensors(bytes), options);
      require(again.adapters.size() == 1);
      const io::adapter_entry& f = again.adapters[0];
      require(f.a.shape == e.a.shape && f.b.shape == e.b.shape && f.kind == e.kind);
      require(f.magnitude.has_value() == e.magnitude.has_value());
      if (naming == io::adapter_naming::peft) require(std::abs(f.scale() - e.scale()) <= 1e-12 * std::abs(e.scale()));
      if (naming == io::adapter_naming::kohya)
        require(io::detail::flattened(f.module) == io::detail::flattened(e.module));
      else
        require(f.module == e.module);
      require(again.find(f.path()) == &f);
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::string_view text(reinterpret_cast<const char*>(data), size);
  const std::string_view config_text = take_until(text, "\n\n");
  const std::string_view metadata_text = take_until(text, "\n\n");
  io::adapter_read_options options;
  try {
    options.config = io::parse_adapter_config(config_text);
    const io::adapter_config again = io::parse_adapter_config(io::adapter_config_text(*options.config));
    require(again.r == options.config->r && again.lora_alpha == options.config->lora_alpha);
    require(again.rank_pattern == options.config->rank_pattern && again.alpha_pattern == options.config->alpha_pattern);
    require(again.target_modules == options.config->target_modules &&
            again.json == io::detail::json_of(*options.config));
  } catch (const io_error&) {
  }
  std::vector<std::byte> bytes;
  try {
    std::map<std::string, std::string> metadata;
    if (!metadata_text.empty()) metadata["lora_adapter_metadata"] = metadata_text;
    bytes = io::safetensors_bytes(tensors_of(text), metadata);
  } catch (const value_error&) {
    return 0;  // names that no file can hold
  } catch (const shape_error&) {
    return 0;  // nor shapes
  }
  const io::safetensors tensors = io::parse_safetensors(bytes);
  for (const bool keep_others : {false, true}) {
    options.keep_others = keep_others;
    try {
      write_again(io::parse_adapters(tensors, options));
    } catch (const io_error&) {
    }
  }
  return 0;
}
