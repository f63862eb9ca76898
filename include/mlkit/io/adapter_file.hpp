// LoRA adapters in files: the namings of PEFT, diffusers (two) and kohya, read into one neutral form and written from
// it. Needs nlohmann/json (for adapter_config.json).
#pragma once

#include <cmath>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "adapter_config.hpp"
#include "safetensors.hpp"

namespace MLKIT_NAMESPACE::io {

/// How a file names its tensors.
enum class adapter_naming {
  peft,           ///< base_model.model.\<module\>.lora_A.weight, beside an adapter_config.json
  diffusers,      ///< unet.\<module\>.lora.down.weight, text_encoder.\<module\>.lora_linear_layer.down.weight
  diffusers_old,  ///< \<block\>.processor.to_q_lora.down.weight
  kohya,          ///< lora_unet_\<module with underscores\>.lora_down.weight, with .alpha
};

enum class adapter_kind { linear, convolution, embedding };

/// One adapter as a file holds it: W + scale B A for the module's weight W. Nothing is copied; the tensors look at the
/// mapped file and keep it alive.
struct adapter_entry {
  std::string component;  ///< "unet", "text_encoder", "text_encoder_2", "transformer", ... or empty
  std::string module;     ///< dotted path inside the component
  adapter_kind kind = adapter_kind::linear;
  tensor_info a;                              ///< [r, in]; convolution [r, in, kernel...]; embedding [r, tokens]
  tensor_info b;                              ///< [out, r]; convolution [out, r, 1...]; embedding [width, r]
  std::optional<tensor_info> magnitude = {};  ///< DoRA: [out] whatever the file's shape; embedding [width]
  std::optional<double> alpha = {};           ///< none: alpha = r
  bool rslora = false;

  index_t rank() const noexcept { return a.shape.empty() ? 0 : a.shape[0]; }
  index_t in() const noexcept { return a.shape.size() < 2 ? 0 : a.shape[1]; }
  index_t out() const noexcept { return b.shape.empty() ? 0 : b.shape[0]; }
  /// The extents of the kernel; empty unless a convolution.
  std::span<const index_t> kernel() const noexcept {
    return std::span(a.shape).subspan(std::min<std::size_t>(2, a.shape.size()));
  }
  /// alpha / r, or alpha / sqrt(r) for rsLoRA.
  double scale() const noexcept {
    const auto r = static_cast<double>(rank());
    return alpha.value_or(r) / (rslora ? std::sqrt(r) : r);
  }
  /// component.module, or module alone.
  std::string path() const { return component.empty() ? module : component + "." + module; }
};

/// The adapters of one file.
struct adapter_file {
  adapter_naming naming = adapter_naming::peft;
  std::vector<adapter_entry> adapters;            ///< by component and module
  std::map<std::string, adapter_config> configs;  ///< by component; PEFT's adapter_config.json is under ""
  std::vector<tensor_info> others;                ///< what belongs to no adapter; empty unless asked for
  std::map<std::string, std::string> metadata;
  std::string source;

  /// The adapter of a module, given as `module` or `component.module`, or null. Files with kohya's names have lost the
  /// difference between '.' and '_'; there the two are taken as equal where the exact name is not found. Throws
  /// io_error if several fit.
  const adapter_entry* find(std::string_view module) const;
  /// The same; throws io_error if there is none.
  const adapter_entry& at(std::string_view module) const;
};

/// How to read adapters.
struct adapter_read_options {
  std::optional<adapter_config> config = {};  ///< instead of the adapter_config.json beside the file
  bool keep_others = false;                   ///< collect tensors that belong to no adapter, rather than refuse them
  safetensors_options file = {};
};

/// How to write adapters.
struct adapter_write_options {
  adapter_naming naming = adapter_naming::peft;
  adapter_config config = {};  ///< for peft and diffusers; where it disagrees with the adapters, they are right
  std::map<std::string, std::string> metadata = {};
  bool fold_scale = false;  ///< multiply B by the scale and write alpha = r, for readers that know no alpha
};

namespace detail {

inline constexpr std::string_view peft_prefix = "base_model.model.";

struct component_prefix {
  std::string_view kohya, component;
};
// Longer prefixes first where one begins another.
inline constexpr component_prefix kohya_prefixes[] = {
    {"lora_unet_", "unet"},          {"lora_te_", "text_encoder"},    {"lora_te1_", "text_encoder"},
    {"lora_te2_", "text_encoder_2"}, {"lora_te3_", "text_encoder_3"}, {"lora_transformer_", "transformer"},
};
inline constexpr std::string_view components[] = {"unet",           "text_encoder", "text_encoder_2",
                                                  "text_encoder_3", "transformer",  "transformer_2"};

// Names in diffusers' and transformers' models, and in the original Stable Diffusion and Flux, that contain
// underscores.
inline constexpr std::string_view underscored[] = {
    "down_blocks",
    "up_blocks",
    "mid_block",
    "transformer_blocks",
    "single_transformer_blocks",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "to_add_out",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "proj_in",
    "proj_out",
    "proj_mlp",
    "time_emb_proj",
    "time_embedding",
    "add_embedding",
    "class_embedding",
    "linear_1",
    "linear_2",
    "conv_in",
    "conv_out",
    "conv_shortcut",
    "ff_context",
    "context_embedder",
    "x_embedder",
    "text_embedder",
    "timestep_embedder",
    "guidance_embedder",
    "time_text_embed",
    "norm_out",
    "norm1_context",
    "text_model",
    "self_attn",
    "q_proj",
    "k_proj",
    "v_proj",
    "out_proj",
    "text_projection",
    "token_embedding",
    "position_embedding",
    "input_blocks",
    "middle_block",
    "output_blocks",
    "time_embed",
    "label_emb",
    "in_layers",
    "out_layers",
    "emb_layers",
    "skip_connection",
    "double_blocks",
    "single_blocks",
    "img_attn",
    "txt_attn",
    "img_mlp",
    "txt_mlp",
    "img_mod",
    "txt_mod",
    "img_in",
    "txt_in",
    "time_in",
    "vector_in",
    "guidance_in",
    "final_layer",
    "in_layer",
    "out_layer",
};

inline std::string flattened(std::string_view module) {
  std::string s(module);
  for (char& c : s)
    if (c == '.') c = '_';
  return s;
}

// down_blocks_0_attentions_1 becomes down_blocks.0.attentions.1: at every place the longest known name is taken.
inline std::string unflattened(std::string_view flat) {
  std::string dotted;
  while (!flat.empty()) {
    std::size_t length = std::min(flat.find('_', 1), flat.size());
    for (const std::string_view name : underscored)
      if (name.size() > length && flat.starts_with(name) && (flat.size() == name.size() || flat[name.size()] == '_'))
        length = name.size();
    if (!dotted.empty()) dotted += '.';
    dotted += flat.substr(0, length);
    // An underscore at the very end belongs to the name, so that flattening gives the same text again.
    if (length + 1 == flat.size()) dotted += '.';
    flat.remove_prefix(std::min(length + 1, flat.size()));
  }
  return dotted;
}

enum class adapter_part { a, b, magnitude, alpha };

struct adapter_key {
  adapter_part part = adapter_part::a;
  adapter_naming naming = adapter_naming::peft;
  bool embedding = false;
  std::string component, module;
};

struct key_suffix {
  std::string_view text;
  adapter_part part;
  adapter_naming naming;
};
inline constexpr key_suffix key_suffixes[] = {
    {".lora.down.weight", adapter_part::a, adapter_naming::diffusers},
    {".lora.up.weight", adapter_part::b, adapter_naming::diffusers},
    {".lora_linear_layer.down.weight", adapter_part::a, adapter_naming::diffusers},
    {".lora_linear_layer.up.weight", adapter_part::b, adapter_naming::diffusers},
    {"_lora.down.weight", adapter_part::a, adapter_naming::diffusers_old},
    {"_lora.up.weight", adapter_part::b, adapter_naming::diffusers_old},
    {".lora_down.weight", adapter_part::a, adapter_naming::kohya},
    {".lora_up.weight", adapter_part::b, adapter_naming::kohya},
    {".dora_scale", adapter_part::magnitude, adapter_naming::kohya},
    {".alpha", adapter_part::alpha, adapter_naming::kohya},
};

// .lora_A.weight, .lora_A.<adapter>.weight, .lora_embedding_A, .lora_magnitude_vector, ...: what stands before it, or
// nothing if the key does not end so.
inline std::optional<std::string_view> before_peft_suffix(std::string_view key, adapter_key& parsed) {
  struct marker {
    std::string_view text;
    adapter_part part;
    bool embedding, needs_weight;
  };
  constexpr marker markers[] = {
      {".lora_A", adapter_part::a, false, true},
      {".lora_B", adapter_part::b, false, true},
      {".lora_embedding_A", adapter_part::a, true, false},
      {".lora_embedding_B", adapter_part::b, true, false},
      {".lora_magnitude_vector", adapter_part::magnitude, false, false},
  };
  for (const marker& m : markers) {
    const std::size_t at = key.rfind(m.text);
    if (at == std::string_view::npos) continue;
    std::string_view rest = key.substr(at + m.text.size());
    const bool has_weight = rest.ends_with(".weight");
    if (has_weight) rest.remove_suffix(7);
    if ((m.needs_weight && !has_weight) || rest == ".bias") continue;
    if (!rest.empty() && (rest[0] != '.' || rest.size() == 1 || rest.find('.', 1) != std::string_view::npos)) continue;
    parsed.part = m.part;
    parsed.embedding = m.embedding;
    parsed.naming = adapter_naming::peft;
    return key.substr(0, at);
  }
  return std::nullopt;
}

// Which adapter and which part of it a tensor's name means; nothing if it is no part of an adapter.
inline std::optional<adapter_key> parse_adapter_key(std::string_view key) {
  adapter_key parsed;
  std::string_view path;
  const key_suffix* suffix = nullptr;
  for (const key_suffix& s : key_suffixes)
    if (key.ends_with(s.text)) suffix = &s;
  if (suffix) {
    parsed.part = suffix->part;
    parsed.naming = suffix->naming;
    path = key.substr(0, key.size() - suffix->text.size());
  } else if (const auto before = before_peft_suffix(key, parsed)) {
    path = *before;
  } else {
    return std::nullopt;
  }

  if (path.find('.') == std::string_view::npos && path.starts_with("lora_")) {
    for (const component_prefix& prefix : kohya_prefixes)
      if (path.starts_with(prefix.kohya) && path.size() > prefix.kohya.size()) {
        parsed.naming = adapter_naming::kohya;
        parsed.component = prefix.component;
        parsed.module = unflattened(path.substr(prefix.kohya.size()));
        return parsed;
      }
    return std::nullopt;
  }

  if (path == peft_prefix.substr(0, peft_prefix.size() - 1)) return std::nullopt;
  if (path.starts_with(peft_prefix)) {
    path.remove_prefix(peft_prefix.size());
  } else {
    for (const std::string_view component : components)
      if (path.size() > component.size() + 1 && path.starts_with(component) && path[component.size()] == '.') {
        parsed.component = component;
        if (parsed.naming == adapter_naming::peft) parsed.naming = adapter_naming::diffusers;
        path.remove_prefix(component.size() + 1);
        break;
      }
  }
  parsed.module = path;
  for (std::size_t at; (at = parsed.module.find(".processor.")) != std::string::npos;) parsed.module.erase(at, 10);
  if (parsed.naming == adapter_naming::diffusers_old) {
    // to_q_lora stands for to_q in a UNet and for q_proj in a text encoder; to_out_lora for to_out.0 and out_proj.
    if (parsed.component.empty()) parsed.component = "unet";
    const bool text = parsed.component.starts_with("text_encoder");
    const std::size_t last = parsed.module.rfind('.') + 1;
    const std::string projection = parsed.module.substr(last);
    const bool known = projection == "to_q" || projection == "to_k" || projection == "to_v" || projection == "to_out";
    if (!known) return std::nullopt;
    if (text)
      parsed.module.replace(last, std::string::npos, projection.substr(3) + "_proj");
    else if (projection == "to_out")
      parsed.module += ".0";
  }
  if (parsed.module.empty()) return std::nullopt;
  return parsed;
}

// Why the parts of an entry do not fit together, or nothing.
inline std::string entry_problem(const adapter_entry& e) {
  const auto shaped = [](const tensor_info& t) { return in_quotes(t.name) + " has shape " + shape_text(t.shape); };
  const auto is_float = [](const tensor_info& t) { return with_float_loader(t.dtype, [](std::size_t, auto) {}); };
  for (const tensor_info* t : {&e.a, &e.b, e.magnitude ? &*e.magnitude : &e.a})
    if (!is_float(*t))
      return in_quotes(t->name) + " has dtype " + std::string(name_of(t->dtype)) +
             ", but a floating-point dtype was expected";
  const std::size_t dims = e.a.shape.size();
  const bool dims_fit = e.kind == adapter_kind::convolution ? dims >= 3 && dims <= 5 : dims == 2;
  if (!dims_fit) return shaped(e.a) + ", which is not the shape of an A";
  bool b_fits = e.b.shape.size() == dims;
  for (std::size_t d = 2; b_fits && d < dims; ++d) b_fits = e.b.shape[d] == 1;
  if (!b_fits) return shaped(e.b) + ", which does not fit " + shaped(e.a);
  for (const tensor_info* t : {&e.a, &e.b})
    if (t->count() == 0) return shaped(*t) + ", without any element";
  if (e.a.shape[0] != e.b.shape[1])
    return shaped(e.a) + ", of rank " + std::to_string(e.a.shape[0]) + ", but " + shaped(e.b) + ", of rank " +
           std::to_string(e.b.shape[1]);
  if (e.magnitude && (e.magnitude->shape.size() != 1 || e.magnitude->shape[0] != e.out()))
    return shaped(*e.magnitude) + ", but " + shaped(e.b) + ": one magnitude for each of " + std::to_string(e.out()) +
           " outputs was expected";
  if (e.alpha && !std::isfinite(*e.alpha)) return in_quotes(e.path()) + " has an alpha that is not finite";
  return {};
}

// A magnitude lies as [out] in linear layers and embeddings and as [1, out, 1...] in PEFT's convolutions; dora_scale as
// [out, 1...]. A dora_scale of [1, in...] is LyCORIS' norm over outputs, which is another method.
inline void flatten_magnitude(adapter_entry& e, bool kohya, const std::string& source) {
  tensor_info& m = *e.magnitude;
  const std::size_t dims = m.shape.size();
  const std::size_t along = kohya || e.kind != adapter_kind::convolution || dims < 3 ? 0 : 1;
  bool fits = dims >= 1 && along < dims && m.shape[along] == e.out();
  for (std::size_t d = 0; fits && d < dims; ++d) fits = d == along || m.shape[d] == 1;
  if (!fits)
    fail_io(source, ": ", in_quotes(m.name), " has shape ", shape_text(m.shape), ", but a magnitude for each of the ",
            e.out(), " outputs of ", in_quotes(e.b.name), " was expected");
  m.shape = {e.out()};
}

// The configurations that diffusers puts into the metadata: {"unet.r": 4, "unet.lora_alpha": 8, ...}.
inline std::map<std::string, adapter_config> configs_in_metadata(const std::map<std::string, std::string>& metadata,
                                                                 const std::string& source) {
  std::map<std::string, adapter_config> configs;
  const auto at = metadata.find("lora_adapter_metadata");
  if (at == metadata.end()) return configs;
  const std::string where = source + ": lora_adapter_metadata";
  const json all = parse_json(at->second, where);
  if (!all.is_object()) fail_io(where, ": is ", all.type_name(), ", but an object was expected");
  std::map<std::string, json> parts;
  for (const auto& [key, value] : all.items()) {
    const std::size_t dot = key.find('.');
    const std::string component = dot == std::string::npos ? "" : key.substr(0, dot);
    parts[component][dot == std::string::npos ? key : key.substr(dot + 1)] = value;
  }
  for (auto& [component, part] : parts)
    configs[component] = config_from(std::move(part), where + (component.empty() ? "" : " of " + component));
  return configs;
}

// Ranks must be what the configuration says; alphas and rsLoRA come from it.
inline void apply_config(adapter_file& file, const std::string& component, const adapter_config& config,
                         const std::string& source) {
  refuse_unsupported(config, source);
  const pattern_table<index_t> ranks(config.rank_pattern, config.r, source);
  const pattern_table<double> alphas(config.alpha_pattern, config.lora_alpha, source);
  for (adapter_entry& e : file.adapters) {
    if (e.component != component) continue;
    if (const index_t r = ranks(e.module); r != e.rank())
      fail_io(file.source, ": ", in_quotes(e.a.name), " has shape ", shape_text(e.a.shape), ", of rank ", e.rank(),
              ", but ", source, " says rank ", r);
    const double alpha = alphas(e.module);
    if (e.alpha && *e.alpha != alpha)
      fail_io(file.source, ": ", in_quotes(e.path()), " has alpha ", *e.alpha, ", but ", source, " says ", alpha);
    e.alpha = alpha;
    e.rslora = config.use_rslora;
    if (config.use_dora != e.magnitude.has_value())
      fail_io(file.source, ": ", in_quotes(e.path()), config.use_dora ? " has no" : " has a", " magnitude, but ",
              source, " says use_dora ", config.use_dora ? "true" : "false");
  }
}

}  // namespace detail

inline const adapter_entry* adapter_file::find(std::string_view module) const {
  const adapter_entry* found = nullptr;
  const auto search = [&](auto fits) {
    for (const adapter_entry& e : adapters) {
      if (!fits(e.module) && !fits(e.path())) continue;
      if (found)
        detail::fail_io(source, ": ", detail::in_quotes(module), " is both ", detail::in_quotes(found->path()), " and ",
                        detail::in_quotes(e.path()));
      found = &e;
    }
  };
  search([&](const std::string& name) { return name == module; });
  if (!found && naming == adapter_naming::kohya) {
    const std::string flat = detail::flattened(module);
    search([&](const std::string& name) { return detail::flattened(name) == flat; });
  }
  return found;
}

inline const adapter_entry& adapter_file::at(std::string_view module) const {
  const adapter_entry* e = find(module);
  if (!e) detail::fail_io(source, ": there is no adapter for ", detail::in_quotes(module), " among ", adapters.size());
  return *e;
}

/// The adapters in an opened file. PEFT's names need its configuration, because alpha is there: give it as
/// options.config. Throws io_error, naming the key and both sizes, for a tensor that belongs to no adapter, an A
/// without its B or the reverse, ranks, shapes, magnitudes or alphas that contradict each other or the configuration,
/// and configurations whose meaning mlkit does not support. Nothing is copied.
inline adapter_file parse_adapters(const safetensors& tensors, const adapter_read_options& options = {}) {
  using detail::adapter_part;
  using detail::fail_io;
  using detail::in_quotes;
  adapter_file file;
  file.source = tensors.source();
  file.metadata = tensors.metadata();

  struct parts {
    const tensor_info* of[4] = {};
    bool embedding = false, kohya_magnitude = false;
  };
  std::map<std::pair<std::string, std::string>, parts> modules;
  bool used[4] = {};
  for (const tensor_info& t : tensors) {
    const auto key = detail::parse_adapter_key(t.name);
    if (!key) {
      file.others.push_back(t);
      continue;
    }
    used[static_cast<int>(key->naming)] = true;
    parts& p = modules[{key->component, key->module}];
    const tensor_info*& slot = p.of[static_cast<int>(key->part)];
    if (slot)
      fail_io(file.source, ": ", in_quotes(slot->name), " and ", in_quotes(t.name),
              " are the same part of one adapter");
    slot = &t;
    p.embedding |= key->embedding;
    p.kohya_magnitude |= key->part == adapter_part::magnitude && key->naming == adapter_naming::kohya;
  }
  if (!file.others.empty() && !options.keep_others)
    fail_io(file.source, ": ", in_quotes(file.others[0].name), " belongs to no adapter (one of ", file.others.size(),
            " such tensors)");
  file.naming = used[static_cast<int>(adapter_naming::kohya)]           ? adapter_naming::kohya
                : used[static_cast<int>(adapter_naming::diffusers_old)] ? adapter_naming::diffusers_old
                : used[static_cast<int>(adapter_naming::diffusers)]     ? adapter_naming::diffusers
                                                                        : adapter_naming::peft;

  for (const auto& [name, p] : modules) {
    const tensor_info* const a = p.of[static_cast<int>(adapter_part::a)];
    const tensor_info* const b = p.of[static_cast<int>(adapter_part::b)];
    const tensor_info* const m = p.of[static_cast<int>(adapter_part::magnitude)];
    const tensor_info* const alpha = p.of[static_cast<int>(adapter_part::alpha)];
    if (!a || !b) {
      const tensor_info* const present = a ? a : b ? b : m ? m : alpha;
      fail_io(file.source, ": ", in_quotes(present->name), " is there, but the ", a ? "B" : "A",
              " of the same adapter is not");
    }
    adapter_entry e;
    e.component = name.first;
    e.module = name.second;
    e.a = *a;
    e.b = *b;
    e.kind = p.embedding           ? adapter_kind::embedding
             : a->shape.size() > 2 ? adapter_kind::convolution
                                   : adapter_kind::linear;
    if (const std::string problem = detail::entry_problem(e); !problem.empty()) fail_io(file.source, ": ", problem);
    if (m) {
      e.magnitude = *m;
      detail::flatten_magnitude(e, p.kohya_magnitude, file.source);
    }
    if (alpha) {
      const double value = alpha->scalar();
      e.alpha = value == 0 ? static_cast<double>(e.rank()) : value;
    }
    if (const std::string problem = detail::entry_problem(e); !problem.empty()) fail_io(file.source, ": ", problem);
    file.adapters.push_back(std::move(e));
  }

  file.configs = detail::configs_in_metadata(file.metadata, file.source);
  if (options.config) file.configs[""] = *options.config;
  for (const auto& [component, config] : file.configs)
    detail::apply_config(file, component, config,
                         component.empty() ? "adapter_config.json" : "lora_adapter_metadata of " + component);
  if (file.naming == adapter_naming::peft && !file.configs.contains("") && !file.adapters.empty())
    fail_io(file.source, ": PEFT's names need an adapter_config.json, which holds alpha; there is none");
  return file;
}

/// Reads adapters from a safetensors file, or from a directory that PEFT or diffusers wrote (adapter_model.safetensors
/// or pytorch_lora_weights.safetensors). The file is mapped. An adapter_config.json beside a file with PEFT's names is
/// read. Without any alpha, alpha = r, as diffusers and kohya have it. Throws as safetensors::open and parse_adapters
/// do.
inline adapter_file read_adapters(const std::string& path, adapter_read_options options = {}) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  fs::path model = path;
  if (fs::is_directory(model, ignored)) {
    const fs::path peft = model / "adapter_model.safetensors", diffusers = model / "pytorch_lora_weights.safetensors";
    model = fs::exists(peft, ignored) || !fs::exists(diffusers, ignored) ? peft : diffusers;
  }
  const safetensors tensors = safetensors::open(model.string(), options.file);
  if (!options.config) {
    const bool has_prefix = std::any_of(tensors.begin(), tensors.end(), [](const tensor_info& t) {
      const auto key = detail::parse_adapter_key(t.name);
      return key && key->naming == adapter_naming::peft;
    });
    const fs::path config = model.parent_path() / "adapter_config.json";
    if (has_prefix && fs::exists(config, ignored)) options.config = read_adapter_config(config.string());
  }
  return parse_adapters(tensors, options);
}

namespace detail {

// The value that most entries have, so that the patterns list the fewest.
template <class T>
T most_common(const std::vector<T>& values) {
  std::map<T, int> counts;
  for (const T& v : values) ++counts[v];
  T best = values.front();
  for (const auto& [value, count] : counts)
    if (count > counts[best]) best = value;
  return best;
}

inline std::string exact_pattern(std::string_view module) {
  std::string pattern = "^";
  for (const char c : module) {
    if (std::string_view("\\^$.|?*+()[]{}").find(c) != std::string_view::npos) pattern += '\\';
    pattern += c;
  }
  return pattern;
}

// The configuration that says for these entries what each of them says.
inline adapter_config config_of(adapter_config config, const std::vector<const adapter_entry*>& entries) {
  std::vector<index_t> ranks;
  std::vector<double> alphas;
  const bool rslora = std::all_of(entries.begin(), entries.end(), [](const auto* e) { return e->rslora; });
  const bool dora = entries.front()->magnitude.has_value();
  for (const adapter_entry* e : entries) {
    if (dora != e->magnitude.has_value())
      fail_value("io::write_adapters: ", in_quotes(entries.front()->path()), " and ", in_quotes(e->path()),
                 " differ in having a magnitude, which one PEFT configuration cannot say");
    ranks.push_back(e->rank());
    // Where only some adapters are rsLoRA, plain alphas with the same scales stand for them.
    const auto r = static_cast<double>(e->rank());
    alphas.push_back(e->rslora && !rslora ? e->scale() * r : e->alpha.value_or(r));
  }
  config.use_dora = dora;
  if (config.use_rslora == rslora && !config.target_modules.empty()) {
    // What the caller's configuration says already stays as it is.
    const std::string source = "io::write_adapters: config";
    const pattern_table<index_t> rank_of(config.rank_pattern, config.r, source);
    const pattern_table<double> alpha_of(config.alpha_pattern, config.lora_alpha, source);
    const auto targeted = [&](const std::string& module) {
      return std::any_of(config.target_modules.begin(), config.target_modules.end(), [&](const std::string& target) {
        return config.target_modules_is_pattern ? name_pattern(target, source).matches(module)
                                                : module == target || module.ends_with("." + target);
      });
    };
    bool agrees = true;
    for (std::size_t i = 0; i < entries.size(); ++i) {
      const std::string& module = entries[i]->module;
      agrees &= rank_of(module) == ranks[i] && alpha_of(module) == alphas[i] && targeted(module);
    }
    if (agrees) return config;
  }
  config.use_rslora = rslora;
  config.r = most_common(ranks);
  config.lora_alpha = most_common(alphas);
  config.rank_pattern.clear();
  config.alpha_pattern.clear();
  config.target_modules.clear();
  config.target_modules_is_pattern = false;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const std::string pattern = exact_pattern(entries[i]->module);
    if (ranks[i] != config.r) config.rank_pattern.emplace_back(pattern, ranks[i]);
    if (alphas[i] != config.lora_alpha) config.alpha_pattern.emplace_back(pattern, alphas[i]);
    config.target_modules.push_back(entries[i]->module);
  }
  std::sort(config.target_modules.begin(), config.target_modules.end());
  return config;
}

template <class T>
tensor_info scaled(const tensor_info& t, double scale) {
  auto copy = make_aligned<std::byte>(static_cast<index_t>(t.bytes));
  const std::span<T> values(reinterpret_cast<T*>(copy.get()), static_cast<std::size_t>(t.count()));
  t.copy_to(values);
  for (T& v : values) v = narrow<T>(static_cast<double>(v) * scale);
  tensor_info result = t;
  result.data = copy.get();
  result.owner = std::make_shared<const byte_image>(std::move(copy), t.bytes);
  return result;
}

inline tensor_info scaled(const tensor_info& t, double scale) {
  switch (t.dtype) {
    case dtype::f32: return scaled<float>(t, scale);
    case dtype::f64: return scaled<double>(t, scale);
    case dtype::f16: return scaled<mlkit::f16>(t, scale);
    case dtype::bf16: return scaled<mlkit::bf16>(t, scale);
    default:
      fail_value("io::write_adapters: ", t.describe(), " has dtype ", name_of(t.dtype), ", which cannot be scaled");
  }
}

inline tensor_info renamed(tensor_info t, std::string name, std::vector<index_t> shape) {
  t.name = std::move(name);
  t.shape = std::move(shape);
  return t;
}

// [out] as the naming wants it: PEFT [out], and [1, out, 1...] for convolutions; kohya [out, 1...].
inline std::vector<index_t> magnitude_shape(const adapter_entry& e, bool kohya) {
  std::vector<index_t> shape(1, e.out());
  if (kohya) {
    shape.resize(e.a.shape.size(), 1);
  } else if (e.kind == adapter_kind::convolution) {
    shape.insert(shape.begin(), 1);
    shape.resize(e.a.shape.size(), 1);
  }
  return shape;
}

class adapter_namer {
 public:
  adapter_namer(adapter_naming naming, bool several_text_encoders) : naming_(naming), several_(several_text_encoders) {}

  void add(const adapter_entry& e, std::vector<tensor_info>& out) const {
    const auto put = [&](const tensor_info& t, std::string name) {
      out.push_back(renamed(t, std::move(name), t.shape));
    };
    switch (naming_) {
      case adapter_naming::peft: {
        const std::string path = std::string(peft_prefix) + e.module;
        const bool embedding = e.kind == adapter_kind::embedding;
        put(e.a, path + (embedding ? ".lora_embedding_A" : ".lora_A.weight"));
        put(e.b, path + (embedding ? ".lora_embedding_B" : ".lora_B.weight"));
        if (e.magnitude)
          out.push_back(renamed(*e.magnitude, path + ".lora_magnitude_vector", magnitude_shape(e, false)));
        return;
      }
      case adapter_naming::diffusers: {
        refuse_embedding(e, "diffusers'");
        const std::string component = e.component.empty() ? "unet" : e.component;
        const std::string path = component + "." + e.module;
        const std::string infix = component.starts_with("text_encoder") ? ".lora_linear_layer" : ".lora";
        put(e.a, path + infix + ".down.weight");
        put(e.b, path + infix + ".up.weight");
        if (e.magnitude)
          out.push_back(renamed(*e.magnitude, path + ".lora_magnitude_vector", magnitude_shape(e, false)));
        return;
      }
      case adapter_naming::diffusers_old: {
        refuse_embedding(e, "diffusers' old");
        const std::string path = old_path(e);
        put(e.a, path + "_lora.down.weight");
        put(e.b, path + "_lora.up.weight");
        return;
      }
      case adapter_naming::kohya: {
        refuse_embedding(e, "kohya's");
        const std::string path = kohya_prefix(e) + flattened(e.module);
        put(e.a, path + ".lora_down.weight");
        put(e.b, path + ".lora_up.weight");
        out.push_back(named_scalar(path + ".alpha", static_cast<float>(e.scale() * static_cast<double>(e.rank()))));
        if (e.magnitude) out.push_back(renamed(*e.magnitude, path + ".dora_scale", magnitude_shape(e, true)));
        return;
      }
    }
  }

 private:
  static void refuse_embedding(const adapter_entry& e, std::string_view whose) {
    if (e.kind == adapter_kind::embedding)
      fail_value("io::write_adapters: ", in_quotes(e.path()), " adapts an embedding, which has no name among ", whose);
  }

  static std::string old_path(const adapter_entry& e) {
    if (!e.component.empty() && e.component != "unet")
      fail_value("io::write_adapters: ", in_quotes(e.path()), ": diffusers' old names are those of a UNet alone");
    std::string module = e.module;
    if (module.ends_with(".to_out.0")) module.resize(module.size() - 2);
    const std::size_t last = module.rfind('.');
    const std::string projection = last == std::string::npos ? "" : module.substr(last + 1);
    if (projection != "to_q" && projection != "to_k" && projection != "to_v" && projection != "to_out")
      fail_value("io::write_adapters: ", in_quotes(e.path()),
                 " is not a projection of an attention, and diffusers' old naming has names for nothing else");
    if (e.magnitude)
      fail_value("io::write_adapters: ", in_quotes(e.path()), ": diffusers' old naming has no magnitudes");
    if (e.scale() != 1)
      fail_value("io::write_adapters: ", in_quotes(e.path()), " has scale ", e.scale(),
                 ", but diffusers' old naming has no alpha; set fold_scale to multiply B by it");
    return module.substr(0, last) + ".processor." + projection;
  }

  std::string kohya_prefix(const adapter_entry& e) const {
    if (e.component.empty()) return "lora_unet_";
    if (e.component == "text_encoder") return several_ ? "lora_te1_" : "lora_te_";
    for (const component_prefix& prefix : kohya_prefixes)
      if (prefix.component == e.component) return std::string(prefix.kohya);
    fail_value("io::write_adapters: kohya's naming has no prefix for the component ", in_quotes(e.component));
  }

  adapter_naming naming_;
  bool several_;
};

// {"format": "pt"} is what transformers and diffusers look for.
inline std::map<std::string, std::string> with_format(std::map<std::string, std::string> metadata) {
  metadata.emplace("format", "pt");
  return metadata;
}

}  // namespace detail

/// Writes adapters under the names of another project.
///
/// `peft`: path is a directory, made if missing, for adapter_model.safetensors and adapter_config.json, or ends in
/// ".safetensors" for that file with the configuration beside it. Ranks and alphas that differ between modules go to
/// rank_pattern and alpha_pattern. One component only. `diffusers`: one file, configurations in its metadata; an empty
/// component means unet. `diffusers_old`: attention projections of a UNet with scale 1 only (see fold_scale).
/// `kohya`: rsLoRA's scale goes into alpha. Each file appears whole or not at all (see write_safetensors).
/// Throws shape_error or value_error, before anything is written, for adapters that do not fit together or that the
/// naming cannot express, and io_error where the system refuses.
inline void write_adapters(const std::string& path, const std::vector<adapter_entry>& adapters,
                           const adapter_write_options& options = {}) {
  using detail::in_quotes;
  namespace fs = std::filesystem;
  if (adapters.empty()) detail::fail_value("io::write_adapters: there are no adapters");
  std::vector<adapter_entry> entries = adapters;
  bool several_text_encoders = false;
  std::map<std::string, std::vector<const adapter_entry*>> by_component;
  for (adapter_entry& e : entries) {
    if (e.module.empty()) detail::fail_value("io::write_adapters: an adapter has no module");
    if (!detail::is_utf8(e.path()))
      detail::fail_value("io::write_adapters: the name ", in_quotes(e.path()), " is not valid UTF-8");
    if (const std::string problem = detail::entry_problem(e); !problem.empty())
      detail::fail_shape("io::write_adapters: ", in_quotes(e.path()), ": ", problem);
    if (options.fold_scale) {
      if (e.scale() != 1) e.b = detail::scaled(e.b, e.scale());
      e.alpha = static_cast<double>(e.rank());
      e.rslora = false;
    }
    several_text_encoders |= e.component == "text_encoder_2";
    by_component[e.component].push_back(&e);
  }
  std::vector<tensor_info> tensors;
  const detail::adapter_namer namer(options.naming, several_text_encoders);
  for (const adapter_entry& e : entries) namer.add(e, tensors);
  std::map<std::string, std::string> metadata = options.metadata;

  if (options.naming == adapter_naming::diffusers) {
    detail::json all = detail::json::object();
    for (const auto& [component, members] : by_component) {
      const detail::json config = detail::json_of(detail::config_of(options.config, members));
      for (const auto& [key, value] : config.items()) all[(component.empty() ? "unet" : component) + "." + key] = value;
    }
    metadata["lora_adapter_metadata"] = detail::json_text(all, "io::write_adapters");
  }
  if (options.naming != adapter_naming::peft) {
    write_safetensors(path, tensors, detail::with_format(std::move(metadata)));
    return;
  }

  if (by_component.size() > 1)
    detail::fail_value("io::write_adapters: the adapters belong to ", by_component.size(), " components (",
                       in_quotes(by_component.begin()->first), ", ", in_quotes(std::next(by_component.begin())->first),
                       ", ...), but PEFT's files hold one; write them apart");
  const std::string config = adapter_config_text(detail::config_of(options.config, by_component.begin()->second));
  std::vector<std::size_t> order;
  const std::string header = detail::header_of(tensors, detail::with_format(std::move(metadata)), order);
  fs::path model = path;
  std::error_code code;
  if (model.extension() != ".safetensors") {
    fs::create_directories(model, code);
    if (code) detail::fail_io(path, ": cannot make the directory: ", code.message());
    model /= "adapter_model.safetensors";
  }
  mlkit::detail::file_replacement model_file(model.string());
  mlkit::detail::file_replacement config_file((model.parent_path() / "adapter_config.json").string());
  detail::write_tensors(model_file, header, tensors, order);
  config_file.write(config.data(), config.size());
  model_file.commit();
  config_file.commit();
}

}  // namespace MLKIT_NAMESPACE::io
