#include <catch2/catch.hpp>

#include "../../examples/common/sd15.hpp"
#include "support.hpp"

#include <mlkit/io/adapter_file.hpp>
#include <mlkit/lora/files.hpp>

#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

using namespace mlkit;
using Catch::Contains;
using io::adapter_naming;

namespace {

constexpr adapter_naming all_namings[] = {adapter_naming::peft, adapter_naming::diffusers,
                                          adapter_naming::diffusers_old, adapter_naming::kohya};

// scale B A in f64, [out, in * kernel].
std::vector<double> delta(const io::adapter_entry& e) {
  std::vector<double> a(static_cast<std::size_t>(e.a.count())), b(static_cast<std::size_t>(e.b.count()));
  e.a.copy_to(std::span(a));
  e.b.copy_to(std::span(b));
  const index_t r = e.rank(), out = e.out();
  REQUIRE(r > 0);
  const index_t in = e.a.count() / r;
  std::vector<double> d(static_cast<std::size_t>(out * in));
  for (index_t o = 0; o < out; ++o)
    for (index_t k = 0; k < r; ++k)
      for (index_t i = 0; i < in; ++i)
        d[static_cast<std::size_t>(o * in + i)] +=
            e.scale() * b[static_cast<std::size_t>(o * r + k)] * a[static_cast<std::size_t>(k * in + i)];
  return d;
}

void check_same(const io::adapter_entry& x, const io::adapter_entry& y, double tolerance) {
  CAPTURE(x.path(), y.path());
  CHECK(x.kind == y.kind);
  CHECK(x.a.shape == y.a.shape);
  CHECK(x.b.shape == y.b.shape);
  CHECK(x.scale() == Approx(y.scale()).epsilon(1e-6));
  CHECK(x.magnitude.has_value() == y.magnitude.has_value());
  const auto dx = delta(x), dy = delta(y);
  REQUIRE(dx.size() == dy.size());
  for (std::size_t i = 0; i < dx.size(); ++i) REQUIRE(dx[i] == Approx(dy[i]).epsilon(tolerance).margin(tolerance));
}

struct half {
  std::string name;
  std::vector<index_t> shape;
};

// A file of zeros with these tensors, all of one dtype.
std::vector<std::byte> file_with(const std::vector<half>& halves,
                                 const std::map<std::string, std::string>& metadata = {},
                                 io::dtype dtype = io::dtype::f32) {
  static const std::vector<std::byte> zeros(1 << 16);
  std::vector<io::tensor_info> tensors;
  for (const half& h : halves) {
    io::tensor_info t;
    t.name = h.name;
    t.shape = h.shape;
    t.dtype = dtype;
    t.bytes = static_cast<std::size_t>(t.count() * io::bits_of(dtype) / 8);
    t.data = zeros.data();
    tensors.push_back(t);
  }
  return io::safetensors_bytes(tensors, metadata);
}

io::adapter_file parse(const std::vector<half>& halves, const io::adapter_read_options& options = {},
                       const std::map<std::string, std::string>& metadata = {}, io::dtype dtype = io::dtype::f32) {
  static std::vector<std::vector<std::byte>> kept;  // the parsed file looks at them
  kept.push_back(file_with(halves, metadata, dtype));
  return io::parse_adapters(io::parse_safetensors(kept.back()), options);
}

std::string failure(const std::vector<half>& halves, const io::adapter_read_options& options = {},
                    const std::map<std::string, std::string>& metadata = {}, io::dtype dtype = io::dtype::f32) {
  return io_failure([&] { parse(halves, options, metadata, dtype); });
}

io::adapter_read_options with_config(const std::string& members) {
  return {.config = io::parse_adapter_config("{" + members + "}")};
}

}  // namespace

TEST_CASE("PEFT checkpoints give the updates that PEFT computes", "[io]") {
  for (const char* name : {"peft_tiny", "peft_tiny_rslora", "peft_tiny_dora"}) {
    CAPTURE(name);
    const auto file = io::read_adapters(test_data(name));
    CHECK(file.naming == adapter_naming::peft);
    const auto expected = io::safetensors::open(test_data(name) + "/deltas.safetensors");
    REQUIRE(file.adapters.size() == 8);
    REQUIRE(expected.size() == 8);
    for (const auto& e : file.adapters) {
      CAPTURE(e.module);
      const io::tensor_info& want = expected.at(e.module);
      std::vector<double> theirs(static_cast<std::size_t>(want.count()));
      want.copy_to(std::span(theirs));
      const auto ours = delta(e);
      REQUIRE(ours.size() == theirs.size());
      // PEFT keeps the weight of an embedding as [tokens, width].
      const bool embedding = e.kind == io::adapter_kind::embedding;
      CHECK(embedding == (e.module == "embed"));
      REQUIRE(e.out() > 0);
      for (index_t o = 0; o < e.out(); ++o)
        for (index_t i = 0, n = want.count() / e.out(); i < n; ++i)
          REQUIRE(ours[static_cast<std::size_t>(o * n + i)] ==
                  Approx(theirs[static_cast<std::size_t>(embedding ? i * e.out() + o : o * n + i)])
                      .epsilon(1e-12)
                      .margin(1e-14));
      CHECK(e.magnitude.has_value() == (std::string(name) == "peft_tiny_dora"));
    }
    CHECK(file.at("conv").kind == io::adapter_kind::convolution);
    CHECK(std::vector<index_t>(file.at("conv").kernel().begin(), file.at("conv").kernel().end()) ==
          std::vector<index_t>{3, 5});
    CHECK(file.at("conv").in() == 3);
    if (file.at("conv").magnitude) CHECK(file.at("conv").magnitude->shape == std::vector<index_t>{8});
  }
}

TEST_CASE("the four namings of the same adapters read alike", "[io]") {
  const auto diffusers = io::read_adapters(test_data("diffusers_tiny.safetensors"));
  const auto old = io::read_adapters(test_data("diffusers_old_tiny.safetensors"));
  const auto kohya = io::read_adapters(test_data("kohya_tiny.safetensors"));
  const auto dora = io::read_adapters(test_data("kohya_tiny_dora.safetensors"));
  CHECK(diffusers.naming == adapter_naming::diffusers);
  CHECK(old.naming == adapter_naming::diffusers_old);
  CHECK(kohya.naming == adapter_naming::kohya);
  REQUIRE(diffusers.adapters.size() == 34);
  REQUIRE(old.adapters.size() == 32);
  REQUIRE(kohya.adapters.size() == 34);
  REQUIRE(dora.adapters.size() == 34);
  CHECK(diffusers.configs.size() == 2);
  for (const auto& e : diffusers.adapters) {
    CHECK(e.scale() == (e.component == "unet" ? 1.5 : 2.0));
    const auto& k = kohya.at(e.path());
    CHECK(k.path() == e.path());  // the dots of kohya's names are found again
    CHECK(k.a.dtype == io::dtype::f16);
    check_same(k, e, 2e-3);
    CHECK(dora.at(e.path()).magnitude->shape == std::vector<index_t>{e.out()});
    if (e.component != "unet") continue;
    auto o = old.at(e.module);
    CHECK(o.scale() == 1);
    o.alpha = e.alpha;
    check_same(o, e, 0);
  }
}

TEST_CASE("lookups take the module, the component, and kohya's underscores", "[io]") {
  const auto kohya = io::read_adapters(test_data("kohya_tiny.safetensors"));
  const std::string module = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0";
  CHECK(kohya.at(module).path() == "unet." + module);
  CHECK(kohya.find("unet." + module) == kohya.find(module));
  CHECK(kohya.find("mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0") == kohya.find(module));
  CHECK(kohya.find("mid_block") == nullptr);
  CHECK_THAT(io_failure([&] { kohya.at("mid_block"); }), Contains("no adapter for \"mid_block\" among 34"));
  const auto two = parse({{"unet.x.lora.down.weight", {2, 3}},
                          {"unet.x.lora.up.weight", {4, 2}},
                          {"text_encoder.x.lora.down.weight", {2, 3}},
                          {"text_encoder.x.lora.up.weight", {4, 2}}});
  CHECK_THAT(io_failure([&] { two.at("x"); }), Contains("is both \"text_encoder.x\" and \"unet.x\""));
  CHECK(two.at("unet.x").component == "unet");
}

TEST_CASE("keys of every published form are understood", "[io]") {
  using io::detail::adapter_part;
  struct expectation {
    const char *key, *component, *module;
    adapter_part part;
    adapter_naming naming;
    bool embedding = false;
  };
  using enum adapter_part;
  using enum adapter_naming;
  const expectation known[] = {
      {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "", "model.layers.0.self_attn.q_proj", a,
       peft},
      {"base_model.model.h.0.lora_B.default.weight", "", "h.0", b, peft},
      {"base_model.model.transformer.h.0.lora_A.weight", "", "transformer.h.0", a, peft},
      {"base_model.model.embed.lora_embedding_A", "", "embed", a, peft, true},
      {"base_model.model.embed.lora_embedding_B.default", "", "embed", b, peft, true},
      {"base_model.model.embed.lora_embedding_A.weight", "", "embed", a, peft, true},
      {"base_model.model.x.lora_magnitude_vector", "", "x", magnitude, peft},
      {"base_model.model.x.lora_magnitude_vector.weight", "", "x", magnitude, peft},
      {"base_model.model.x.lora_magnitude_vector.default.weight", "", "x", magnitude, peft},
      {"x.y.lora_A.weight", "", "x.y", a, peft},
      {"unet.conv_in.lora_A.weight", "unet", "conv_in", a, diffusers},
      {"transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight", "transformer",
       "single_transformer_blocks.0.proj_mlp", b, diffusers},
      {"unet.mid_block.attn1.to_q.lora.down.weight", "unet", "mid_block.attn1.to_q", a, diffusers},
      {"unet.mid_block.attn1.processor.to_q.lora.up.weight", "unet", "mid_block.attn1.to_q", b, diffusers},
      {"text_encoder.text_model.encoder.layers.0.self_attn.out_proj.lora_linear_layer.up.weight", "text_encoder",
       "text_model.encoder.layers.0.self_attn.out_proj", b, diffusers},
      {"text_encoder_2.x.lora_linear_layer.down.weight", "text_encoder_2", "x", a, diffusers},
      {"mid_block.attn2.processor.to_q_lora.down.weight", "unet", "mid_block.attn2.to_q", a, diffusers_old},
      {"unet.mid_block.attn2.processor.to_out_lora.up.weight", "unet", "mid_block.attn2.to_out.0", b, diffusers_old},
      {"text_encoder.layers.0.self_attn.to_k_lora.down.weight", "text_encoder", "layers.0.self_attn.k_proj", a,
       diffusers_old},
      {"text_encoder.layers.0.self_attn.to_out_lora.up.weight", "text_encoder", "layers.0.self_attn.out_proj", b,
       diffusers_old},
      {"lora_unet_down_blocks_0_attentions_1_proj_in.lora_down.weight", "unet", "down_blocks.0.attentions.1.proj_in", a,
       kohya},
      {"lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj.lora_up.weight", "unet",
       "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj", b, kohya},
      {"lora_unet_up_blocks_1_resnets_2_time_emb_proj.alpha", "unet", "up_blocks.1.resnets.2.time_emb_proj",
       adapter_part::alpha, kohya},
      {"lora_unet_down_blocks_0_resnets_0_conv_shortcut.dora_scale", "unet", "down_blocks.0.resnets.0.conv_shortcut",
       magnitude, kohya},
      {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k.lora_down.weight", "unet",
       "input_blocks.4.1.transformer_blocks.0.attn1.to_k", a, kohya},
      {"lora_te_text_model_encoder_layers_11_mlp_fc1.lora_down.weight", "text_encoder",
       "text_model.encoder.layers.11.mlp.fc1", a, kohya},
      {"lora_te1_text_model_encoder_layers_3_self_attn_out_proj.lora_up.weight", "text_encoder",
       "text_model.encoder.layers.3.self_attn.out_proj", b, kohya},
      {"lora_te2_text_projection.alpha", "text_encoder_2", "text_projection", adapter_part::alpha, kohya},
  };
  for (const expectation& e : known) {
    CAPTURE(e.key);
    const auto key = io::detail::parse_adapter_key(e.key);
    REQUIRE(key);
    CHECK(key->component == e.component);
    CHECK(key->module == e.module);
    CHECK(key->part == e.part);
    CHECK(key->naming == e.naming);
    CHECK(key->embedding == e.embedding);
  }
  for (const char* key : {"",
                          "x",
                          "lora_A.weight",
                          ".lora_A.weight",
                          "base_model.model.x.weight",
                          "base_model.model.x.lora_A",
                          "base_model.model.x.lora_A.bias",
                          "base_model.model.x.lora_B.bias",
                          "base_model.model.x.lora_A.a.b.weight",
                          "base_model.model.x.lora_A..weight",
                          "base_model.model.x.lora_AB.weight",
                          "base_model.model.lora_A.weight",
                          "base_model.model.x.lora_magnitude_vector.bias",
                          "lora_unet_.lora_down.weight",
                          "lora_vae_x.lora_down.weight",
                          "lora_unet_x.lora_mid.weight",
                          "lora_unet_x.hada_w1_a",
                          "lora_unet_x.lokr_w1",
                          "x.processor.to_z_lora.down.weight",
                          "emb_params"}) {
    CAPTURE(key);
    CHECK_FALSE(io::detail::parse_adapter_key(key));
  }
}

TEST_CASE("any text keeps its meaning through kohya's underscores", "[io]") {
  for (const char* flat :
       {"a", "a_b", "_", "__", "a_", "_a", "a__b", "down_blocks_0", "down_blocks_", "xdown_blocks_0", "to_q", "to_qk",
        "to_out_0", "text_model_encoder_layers_0_self_attn_q_proj", "time_embedding_linear_1"}) {
    CAPTURE(flat);
    CHECK(io::detail::flattened(io::detail::unflattened(flat)) == flat);
  }
}

TEST_CASE("tensors that belong to no adapter are refused by name, or kept on request", "[io]") {
  const std::vector<half> halves{{"lora_unet_x.lora_down.weight", {2, 3}},
                                 {"lora_unet_x.lora_up.weight", {4, 2}},
                                 {"lora_unet_x.lora_mid.weight", {2, 2}},
                                 {"other", {1}}};
  CHECK_THAT(failure(halves), Contains("\"lora_unet_x.lora_mid.weight\" belongs to no adapter (one of 2"));
  const auto file = parse(halves, {.keep_others = true});
  CHECK(file.others.size() == 2);
  CHECK(file.adapters.size() == 1);
}

TEST_CASE("missing halves and parts given twice are refused", "[io]") {
  CHECK_THAT(failure({{"lora_unet_x.lora_down.weight", {2, 3}}}),
             Contains("\"lora_unet_x.lora_down.weight\" is there, but the B of the same adapter is not"));
  CHECK_THAT(failure({{"unet.x.lora.up.weight", {2, 3}}}), Contains("but the A of the same adapter is not"));
  CHECK_THAT(failure({{"lora_unet_x.alpha", {}}}), Contains("\"lora_unet_x.alpha\" is there, but the A"));
  CHECK_THAT(failure({{"lora_unet_x.dora_scale", {4, 1}}}), Contains("\"lora_unet_x.dora_scale\" is there, but the A"));
  CHECK_THAT(failure({{"lora_te_x.lora_down.weight", {2, 3}}, {"lora_te1_x.lora_down.weight", {2, 3}}}),
             Contains("\"lora_te1_x.lora_down.weight\" and \"lora_te_x.lora_down.weight\" are the same part"));
  CHECK_THAT(failure({{"x.lora_A.one.weight", {2, 3}}, {"x.lora_A.two.weight", {2, 3}}}), Contains("same part"));
}

TEST_CASE("shapes that contradict each other are refused with both sizes", "[io]") {
  const auto linear = [&](std::vector<index_t> a, std::vector<index_t> b) {
    return failure({{"lora_unet_x.lora_down.weight", std::move(a)}, {"lora_unet_x.lora_up.weight", std::move(b)}});
  };
  CHECK_THAT(linear({4, 24}, {40, 5}), Contains("lora_down.weight\" has shape [4, 24], of rank 4, but "
                                                "\"lora_unet_x.lora_up.weight\" has shape [40, 5], of rank 5"));
  CHECK_THAT(linear({4}, {40, 4}), Contains("shape [4], which is not the shape of an A"));
  CHECK_THAT(linear({4, 3, 1, 1, 1, 1}, {40, 4}), Contains("which is not the shape of an A"));
  CHECK_THAT(linear({4, 3, 2, 2}, {40, 4}), Contains("shape [40, 4], which does not fit"));
  CHECK_THAT(linear({4, 3, 2, 2}, {40, 4, 2, 1}), Contains("shape [40, 4, 2, 1], which does not fit"));
  CHECK_THAT(linear({0, 3}, {40, 0}), Contains("shape [0, 3], without any element"));
  CHECK_THAT(linear({4, 3}, {0, 4}), Contains("shape [0, 4], without any element"));
  CHECK_THAT(failure({{"unet.x.lora.down.weight", {2, 3}}, {"unet.x.lora.up.weight", {4, 2}}}, {}, {}, io::dtype::i32),
             Contains("has dtype I32, but a floating-point dtype was expected"));
  const auto scaled = [&](std::vector<index_t> m) {
    return failure({{"lora_unet_x.lora_down.weight", {2, 3}},
                    {"lora_unet_x.lora_up.weight", {4, 2}},
                    {"lora_unet_x.dora_scale", std::move(m)}});
  };
  CHECK_THAT(scaled({1, 3}), Contains("dora_scale\" has shape [1, 3], but a magnitude for each of the 4 outputs"));
  CHECK_THAT(scaled({1, 4}), Contains("has shape [1, 4]"));  // LyCORIS' norm over outputs, even where sizes agree
  CHECK_THAT(scaled({3}), Contains("has shape [3]"));
  CHECK_THAT(scaled({}), Contains("has shape []"));
  CHECK_THAT(failure({{"lora_unet_x.lora_down.weight", {2, 3}},
                      {"lora_unet_x.lora_up.weight", {4, 2}},
                      {"lora_unet_x.alpha", {2}}}),
             Contains("\"lora_unet_x.alpha\" has 2 elements, but one was asked for"));
}

TEST_CASE("alpha: missing or zero means the rank, and it must be finite", "[io]") {
  const std::vector<half> halves{{"lora_unet_x.lora_down.weight", {4, 3}}, {"lora_unet_x.lora_up.weight", {5, 4}}};
  CHECK(parse(halves).at("x").scale() == 1);
  auto with_alpha = halves;
  with_alpha.push_back({"lora_unet_x.alpha", {1}});
  CHECK(parse(with_alpha).at("x").scale() == 1);
  const std::vector<float> a(12), b(20);
  const auto file = [&](auto alpha) {
    return io::safetensors_bytes(
        {io::named("lora_unet_x.lora_down.weight", tensor_view<const float, 2>(a.data(), {4, 3})),
         io::named("lora_unet_x.lora_up.weight", tensor_view<const float, 2>(b.data(), {5, 4})),
         io::named_scalar("lora_unet_x.alpha", alpha)});
  };
  const auto whole = file(std::int64_t{2});  // diffusers writes integers
  CHECK(io::parse_adapters(io::parse_safetensors(whole)).at("x").scale() == 0.5);
  const auto nan = file(std::numeric_limits<float>::quiet_NaN());
  CHECK_THAT(io_failure([&] { io::parse_adapters(io::parse_safetensors(nan)); }), Contains("alpha that is not finite"));
}

TEST_CASE("the configuration must agree with the tensors", "[io]") {
  const std::vector<half> halves{{"base_model.model.q.lora_A.weight", {4, 3}},
                                 {"base_model.model.q.lora_B.weight", {5, 4}}};
  CHECK(parse(halves, with_config(R"("r":4,"lora_alpha":6,"use_rslora":true)")).at("q").scale() == 3);
  CHECK_THAT(failure(halves), Contains("PEFT's names need an adapter_config.json"));
  CHECK_THAT(
      failure(halves, with_config(R"("r":8,"lora_alpha":6)")),
      Contains(
          "\"base_model.model.q.lora_A.weight\" has shape [4, 3], of rank 4, but adapter_config.json says rank 8"));
  CHECK_THAT(failure(halves, with_config(R"("r":8,"lora_alpha":6,"rank_pattern":{"q":2})")), Contains("says rank 2"));
  CHECK_THAT(failure(halves, with_config(R"("r":4,"lora_alpha":6,"use_dora":true)")), Contains("has no magnitude"));
  auto dora = halves;
  dora.push_back({"base_model.model.q.lora_magnitude_vector", {5}});
  CHECK_THAT(failure(dora, with_config(R"("r":4,"lora_alpha":6)")), Contains("has a magnitude, but"));
  auto with_alpha = halves;
  with_alpha.push_back({"base_model.model.q.alpha", {}});
  CHECK_THAT(failure(with_alpha, with_config(R"("r":4,"lora_alpha":6)")),
             Contains("\"q\" has alpha 4, but adapter_config.json says 6"));
  for (const char* member :
       {R"("use_qalora":true)", R"("alora_invocation_tokens":[1])", R"("layer_replication":[[0,1]])",
        R"("lora_bias":true)", R"("init_lora_weights":"pissa_niter_4")", R"("init_lora_weights":"olora")"}) {
    CAPTURE(member);
    CHECK_THAT(failure(halves, with_config(R"("r":4,"lora_alpha":6,)" + std::string(member))),
               Contains("does not support") || Contains("changes the base's weights"));
  }
  const std::vector<half> unet{{"unet.q.lora.down.weight", {4, 3}}, {"unet.q.lora.up.weight", {5, 4}}};
  const auto configured = [&](const std::string& text) {
    return parse(unet, {}, {{"lora_adapter_metadata", text}}).at("q").scale();
  };
  CHECK(configured(R"({"unet.r":4,"unet.lora_alpha":2})") == 0.5);
  CHECK_THAT(io_failure([&] { configured(R"({"unet.r":2,"unet.lora_alpha":2})"); }),
             Contains("lora_adapter_metadata of unet says rank 2"));
  CHECK_THAT(io_failure([&] { configured("[1]"); }), Contains("lora_adapter_metadata: is array"));
  CHECK_THAT(io_failure([&] { configured("{"); }), Contains("lora_adapter_metadata: is not JSON"));
}

TEST_CASE("every naming reads back what it wrote", "[io]") {
  temporary_directory folder;
  const auto check = [&](const std::vector<io::adapter_entry>& entries, adapter_naming naming, double tolerance,
                         bool fold_scale = false) {
    CAPTURE(static_cast<int>(naming));
    const std::string path = folder / (naming == adapter_naming::peft ? "peft" : "file.safetensors");
    io::write_adapters(path, entries, {.naming = naming, .fold_scale = fold_scale});
    const auto file = io::read_adapters(path);
    CHECK(file.naming == naming);
    REQUIRE(file.adapters.size() == entries.size());
    for (const auto& e : entries) {
      auto read = file.at(e.module);
      if (fold_scale) {
        CHECK(read.scale() == 1);
        read.alpha = e.alpha;
        read.rslora = e.rslora;
        const auto scaled = delta(file.at(e.module)), want = delta(e);
        for (std::size_t i = 0; i < want.size(); ++i)
          REQUIRE(scaled[i] == Approx(want[i]).epsilon(tolerance).margin(tolerance));
      } else {
        check_same(read, e, tolerance);
      }
    }
  };
  const auto only = [](std::vector<io::adapter_entry> entries, auto keep) {
    std::erase_if(entries, [&](const auto& e) { return !keep(e); });
    return entries;
  };
  for (const char* name : {"peft_tiny", "peft_tiny_rslora", "peft_tiny_dora"}) {
    CAPTURE(name);
    const auto entries = io::read_adapters(test_data(name)).adapters;
    check(entries, adapter_naming::peft, 0);
    const auto nameable = only(entries, [](const auto& e) { return e.kind != io::adapter_kind::embedding; });
    check(nameable, adapter_naming::diffusers, 0);
    check(nameable, adapter_naming::kohya, 1e-6);
  }
  const auto unet = only(io::read_adapters(test_data("diffusers_tiny.safetensors")).adapters,
                         [](const auto& e) { return e.component == "unet"; });
  for (const adapter_naming naming : all_namings) check(unet, naming, 1e-6, true);
  check(io::read_adapters(test_data("kohya_tiny_dora.safetensors")).adapters, adapter_naming::kohya, 0);
  check(io::read_adapters(test_data("kohya_tiny_dora.safetensors")).adapters, adapter_naming::diffusers, 0);
  // Mixed scalings and ranks go into one PEFT configuration.
  auto mixed = io::read_adapters(test_data("peft_tiny")).adapters;
  mixed[0].rslora = true;
  mixed[2].alpha = -0.75;
  mixed[3].alpha.reset();
  check(mixed, adapter_naming::peft, 1e-12);
}

TEST_CASE("other projects' files are written again byte for byte", "[io]") {
  temporary_directory folder;
  for (const char* name : {"peft_tiny", "peft_tiny_rslora", "peft_tiny_dora"}) {
    CAPTURE(name);
    const auto file = io::read_adapters(test_data(name));
    io::write_adapters(folder / name, file.adapters, {.config = file.configs.at("")});
    CHECK(contents(folder / name + "/adapter_model.safetensors") ==
          contents(test_data(name) + "/adapter_model.safetensors"));
    CHECK(contents(folder / name + "/adapter_config.json") == contents(test_data(name) + "/adapter_config.json"));
  }
}

TEST_CASE("what a naming cannot express is refused before anything is written", "[io]") {
  temporary_directory folder;
  const auto tiny = io::read_adapters(test_data("peft_tiny")).adapters;
  const auto dora = io::read_adapters(test_data("peft_tiny_dora")).adapters;
  const auto mixed = io::read_adapters(test_data("diffusers_tiny.safetensors")).adapters;
  const auto refusal = [&](std::vector<io::adapter_entry> entries, adapter_naming naming) {
    return message_of<value_error>([&] { io::write_adapters(folder / "x.safetensors", entries, {.naming = naming}); });
  };
  CHECK_THAT(refusal({}, adapter_naming::peft), Contains("there are no adapters"));
  CHECK_THAT(refusal(mixed, adapter_naming::peft), Contains("2 components (\"text_encoder\", \"unet\""));
  CHECK_THAT(refusal({tiny[0], dora[1]}, adapter_naming::peft), Contains("differ in having a magnitude"));
  for (const adapter_naming naming : {adapter_naming::diffusers, adapter_naming::diffusers_old, adapter_naming::kohya})
    CHECK_THAT(refusal({tiny.back()}, naming), Contains("\"embed\" adapts an embedding"));
  CHECK_THAT(refusal({tiny[0]}, adapter_naming::diffusers_old), Contains("is not a projection of an attention"));
  CHECK_THAT(refusal({mixed.front()}, adapter_naming::diffusers_old), Contains("names are those of a UNet alone"));
  CHECK_THAT(refusal({mixed.back()}, adapter_naming::diffusers_old),
             Contains("has scale 1.5") && Contains("fold_scale"));
  auto other = tiny[0];
  other.component = "vae";
  CHECK_THAT(refusal({other}, adapter_naming::kohya), Contains("no prefix for the component \"vae\""));
  CHECK_THAT(refusal({tiny[0], tiny[0]}, adapter_naming::peft), Contains("two tensors are named"));
  other.b = tiny[2].b;
  other.b.shape = {12, 8};
  CHECK_THAT(message_of<shape_error>([&] { io::write_adapters(folder / "x", {other}); }), Contains("of rank 8"));
  CHECK(folder.files() == 0);
}

TEST_CASE("text that is not UTF-8 is refused under every naming, and nothing is written", "[io]") {
  temporary_directory folder;
  auto entry = io::read_adapters(test_data("kohya_tiny.safetensors")).adapters.front();
  const auto refusal = [&](const io::adapter_write_options& options) {
    return message_of<value_error>([&] { io::write_adapters(folder / "x", {entry}, options); });
  };
  const std::string good = std::exchange(entry.module, "mid_block.attn1.to_q\xc3");
  for (const adapter_naming naming : all_namings)
    CHECK(refusal({.naming = naming}) == "mlkit::value_error: io::write_adapters: the name \"" + entry.component +
                                             ".mid_block.attn1.to_q?\" is not valid UTF-8");
  entry.module = good;
  entry.component = "\xff";
  CHECK_THAT(refusal({}), Contains("the name \"?." + good + "\" is not valid UTF-8"));
  entry.component.clear();
  io::adapter_config config = io::parse_adapter_config(R"({"r":4,"lora_alpha":4})");
  config.bias = "\xed\xa0\x80";  // a surrogate
  for (const adapter_naming naming : {adapter_naming::peft, adapter_naming::diffusers}) {
    CHECK_THAT(refusal({.naming = naming, .config = config}),
               Contains("a string of the configuration is not valid UTF-8"));
    CHECK_THAT(refusal({.naming = naming, .metadata = {{"\xff", "x"}}}), Contains("metadata \"?\" is not valid UTF-8"));
  }
  CHECK(folder.files() == 0);
}

TEST_CASE("Stable Diffusion 1.5 at rank 4 has the published sizes", "[io]") {
  temporary_directory folder;
  const auto count = [&](bool cross_only) {
    std::vector<float> memory(4 * 1280 * 2, 0.5f);
    std::vector<io::adapter_entry> entries;
    for (const auto& p : sd15::attention_projections(cross_only)) {
      const lora::adapter_view<float> halves{{memory.data(), {4, p.in}}, {memory.data(), {p.out, 4}}, 1.0};
      entries.push_back(lora::file_entry(p.module, halves, {.component = "unet"}));
    }
    io::write_adapters(folder / "sd.safetensors", entries, {.naming = adapter_naming::diffusers});
    const auto file = io::safetensors::open(folder / "sd.safetensors");
    index_t tensors = 0, parameters = 0, bytes = 0;
    for (const auto& t : file) {
      ++tensors;
      parameters += t.count();
      bytes += static_cast<index_t>(t.bytes);
    }
    CHECK(io::read_adapters(folder / "sd.safetensors").adapters.size() * 2 == static_cast<std::size_t>(tensors));
    return std::array{tensors, parameters, bytes};
  };
  CHECK(count(false) == std::array<index_t, 3>{256, 797'184, 3'188'736});
  CHECK(count(true) == std::array<index_t, 3>{128, 397'824, 1'591'296});
}
