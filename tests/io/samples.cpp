// Files for check_with_python.py, which loads them with the projects whose formats they claim to have. Hidden, because
// it writes where it is told to: test_io "[.samples]" with MLKIT_SAMPLES set.
#include <catch2/catch.hpp>

#include "../../examples/common/sd15.hpp"
#include "support.hpp"

#include <mlkit/lora/files.hpp>

using namespace mlkit;

namespace {

// Element i holds (i - 3) / 4, as in make_safetensors_fixtures.py.
template <class T>
tensor<T, 2> ramp() {
  tensor<T, 2> t({2, 3});
  for (index_t i = 0; i < 6; ++i) t.data()[i] = static_cast<T>(static_cast<float>(i - 3) / 4);
  return t;
}

}  // namespace

TEST_CASE("samples for other readers", "[.samples]") {
  const char* const to = std::getenv("MLKIT_SAMPLES");
  REQUIRE(to);
  const std::string folder = std::string(to) + "/";

  const auto single = ramp<float>();
  const auto wide = ramp<double>();
  const auto half = ramp<f16>();
  const auto brain = ramp<bf16>();
  io::write_safetensors(folder + "tensors.safetensors",
                        {io::named("f32", single), io::named("f64", wide), io::named("f16", half),
                         io::named("bf16", brain), io::named_scalar("scalar", std::int64_t{-7}),
                         io::named("empty", tensor<float, 2>({0, 3})), io::named_scalar("quote\"tab\t\xc3\xa9", 1.5f)},
                        {{"format", "pt"}, {"note", "line\nbreak"}});

  for (const char* name : {"peft_tiny", "peft_tiny_rslora", "peft_tiny_dora"})
    lora::save_adapters(folder + name, lora::load_adapters(test_data(name)));  // no configuration given: one is made
  const auto unet = lora::load_adapters(test_data("diffusers_tiny.safetensors"));
  lora::save_adapters(folder + "diffusers.safetensors", unet, {.naming = io::adapter_naming::diffusers});
  lora::save_adapters(folder + "kohya.safetensors", unet, {.naming = io::adapter_naming::kohya});
  std::vector<io::adapter_entry> old = unet.entries();
  std::erase_if(old, [](const auto& e) { return e.component != "unet"; });
  lora::save_adapters(folder + "diffusers_old.safetensors", old,
                      {.naming = io::adapter_naming::diffusers_old, .fold_scale = true});

  std::vector<float> memory(4 * 1280 * 2, 0.5f);
  std::vector<io::adapter_entry> entries;
  for (const auto& p : sd15::attention_projections()) {
    const lora::adapter_view<float> halves{{memory.data(), {4, p.in}}, {memory.data(), {p.out, 4}}, 1.0};
    entries.push_back(lora::file_entry(p.module, halves, {.component = "unet"}));
  }
  lora::save_adapters(folder + "sd15.safetensors", entries, {.naming = io::adapter_naming::diffusers});
}
