#include <catch2/catch.hpp>

#include <mlkit/lora/files.hpp>

#include "../temporary_directory.hpp"
#include "test_data.hpp"

#include <thread>

using namespace mlkit;
using Catch::Contains;

namespace {

template <class E, class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const E& e) {
    return e.what();
  }
  FAIL("no exception of the kind expected");
  return {};
}

}  // namespace

TEST_CASE("loaded adapters look at the mapped file", "[lora][files]") {
  const auto set = lora::load_adapters(test_data("peft_tiny"));
  REQUIRE(set.size() == 8);
  const lora::adapter_view<float> q = set.at("blocks.0.attn.q_proj");
  CHECK(static_cast<const void*>(q.a.data) == static_cast<const void*>(set.entry("blocks.0.attn.q_proj").a.data));
  CHECK(q.a.extents == extents_t<2>{4, 16});
  CHECK(q.b.extents == extents_t<2>{16, 4});
  CHECK(q.scale == 1.5 / 4);
  const auto conv = set.at("conv");
  CHECK(conv.a.extents == extents_t<2>{3, 3 * 3 * 5});
  CHECK(conv.b.extents == extents_t<2>{8, 3});
  CHECK_FALSE(set.contains("blocks.0"));
  CHECK_THAT(message_of<io_error>([&] { (void)set.at("blocks.0"); }), Contains("no adapter for \"blocks.0\" among 8"));
  CHECK_THAT(message_of<value_error>([&] { (void)set.magnitude("conv"); }), Contains("\"conv\" has none"));
}

TEST_CASE("adapters of other dtypes are converted once, also under several threads", "[lora][files]") {
  const auto set = lora::load_adapters(test_data("peft_tiny_rslora"));  // bf16
  const float* seen[2] = {};
  std::thread other([&] { seen[0] = set.at("conv").a.data; });
  seen[1] = set.at("conv").a.data;
  other.join();
  CHECK(seen[0] == seen[1]);
  const auto raw = set.entry("conv").a.elements<bf16>();
  for (std::size_t i = 0; i < raw.size(); ++i) CHECK(seen[0][i] == static_cast<float>(raw[i]));
  const auto in_place = lora::load_adapters<bf16>(test_data("peft_tiny_rslora"));
  CHECK(static_cast<const void*>(in_place.at("conv").a.data) ==
        static_cast<const void*>(in_place.entry("conv").a.data));
}

TEST_CASE("a DoRA adapter is never taken for a plain one", "[lora][files]") {
  const auto set = lora::load_adapters(test_data("peft_tiny_dora"));
  CHECK_THAT(message_of<value_error>([&] { (void)set.at("conv"); }), Contains("\"conv\" is a DoRA adapter"));
  CHECK(set.halves("conv").rank() == 3);
  CHECK(set.magnitude("conv").extent(0) == 8);
}

TEST_CASE("saved adapters load with the same numbers", "[lora][files]") {
  const temporary_directory at;
  const auto path = at / "adapter";
  auto plain = lora::make_adapter<float>({.in = 6, .out = 5, .rank = 3, .alpha = 7, .seed = 3});
  auto rs = lora::make_adapter<float>({.in = 2 * 9, .out = 4, .rank = 2, .alpha = 3, .seed = 4, .rs = true});
  for (auto* p : {&plain, &rs})
    for (index_t i = 0; i < p->b.size(); ++i) p->b.data()[i] = static_cast<float>(i) / 8;
  lora::save_adapters(path, {lora::file_entry("up", plain), lora::file_entry("conv", rs, {.kernel = {3, 3}})});
  const auto set = lora::load_adapters(path);
  CHECK(set.entry("conv").a.shape == std::vector<index_t>{2, 2, 3, 3});
  for (const auto& [name, p] : {std::pair{"up", &plain}, std::pair{"conv", &rs}}) {
    const auto loaded = set.at(name);
    CHECK(loaded.scale == Approx(p->scale()).epsilon(1e-15));
    CHECK(std::equal(p->a.begin(), p->a.end(), loaded.a.data));
    CHECK(std::equal(p->b.begin(), p->b.end(), loaded.b.data));
  }
  CHECK_THAT(message_of<shape_error>([&] { lora::file_entry("x", plain, {.kernel = {4}}); }),
             Contains("x.a has 6 columns, but the kernel [4] has 4 elements"));
}
