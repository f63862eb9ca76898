#include <catch2/catch.hpp>

#include "support.hpp"

#include <mlkit/io/adapter_config.hpp>

using namespace mlkit;
using Catch::Contains;

namespace {

bool matches(const std::string& key, const std::string& name) {
  return detail::name_pattern(key, "test").matches(name);
}
std::string refusal(const std::string& key) {
  return io_failure([&] { detail::name_pattern(key, "test"); });
}
io::adapter_config parse(const std::string& members) {
  return io::parse_adapter_config(R"({"peft_type":"LORA","r":4,"lora_alpha":8)" + members + "}");
}
std::string failure(const std::string& text) {
  return io_failure([&] { io::parse_adapter_config(text); });
}

}  // namespace

TEST_CASE("patterns match as re.match(rf\"(.*\\.)?({key})$\") does", "[io]") {
  CHECK(matches("up", "up"));
  CHECK(matches("up", "blocks.0.up"));
  CHECK_FALSE(matches("up", "blocks.0.upper"));
  CHECK_FALSE(matches("up", "blocks.0.cup"));
  CHECK_FALSE(matches("up", "up.weight"));
  CHECK(matches("^up", "up"));
  CHECK_FALSE(matches("^up", "blocks.0.up"));
  CHECK(matches("blocks.0.up", "xblocks.0.up") == false);
  CHECK(matches("blocks.0.up", "m.blocks.0.up"));
  CHECK(matches("blocks.0.up", "blocksx0yup"));  // an unescaped dot is any character
  CHECK_FALSE(matches("blocks\\.0\\.up", "blocksx0yup"));
  CHECK(matches("q_proj|v_proj", "layers.3.v_proj"));
  CHECK(matches("layers\\.(1|2|[5-7])\\.mlp", "model.layers.6.mlp"));
  CHECK_FALSE(matches("layers\\.(1|2|[5-7])\\.mlp", "model.layers.4.mlp"));
  CHECK(matches("layers\\.\\d+\\.mlp", "layers.128.mlp"));
  CHECK_FALSE(matches("layers\\.\\d+\\.mlp", "layers..mlp"));
  CHECK(matches("layers\\.\\d{2,3}", "layers.12"));
  CHECK_FALSE(matches("layers\\.\\d{2,3}", "layers.1"));
  CHECK_FALSE(matches("layers\\.\\d{2,3}", "layers.1234"));
  CHECK(matches("a{2}b{0,1}c{1,}", "aacc"));
  CHECK(matches("x{,2}y", "xxy"));
  CHECK(matches("a{b}", "a{b}"));  // no count, so a brace
  CHECK(matches(".*attn.*?", "model.self_attn.q"));
  CHECK(matches("(?:ab)+", "ababab"));
  CHECK(matches("[^.]+", "a.bc"));
  CHECK(matches("[]x-]+", "]-x"));
  CHECK(matches("", ""));
  CHECK(matches("", "a."));
  CHECK_FALSE(matches("", "a"));
  CHECK(matches("a$", "a"));
  CHECK(matches("\\w+\\s\\W\\S\\D", "ab_1 -xy"));
  CHECK_FALSE(matches("a^", "a"));
}

TEST_CASE("no pattern takes long", "[io]") {
  std::string nested = "a";
  for (int i = 0; i < 20; ++i) nested = "(" + nested + "*)";
  CHECK_FALSE(matches(nested + "b", std::string(2000, 'a')));
  CHECK_FALSE(matches("(a|a)*(a|a)*(a|a)*c", std::string(2000, 'a')));
  CHECK_THAT(refusal("((((a{1000}){1000}){1000}){1000})"), Contains("too many states"));
  CHECK_THAT(refusal("(((){1000}){1000}){1000}"), Contains("too many states"));
  CHECK_THAT(refusal(std::string(100'000, '(')), Contains("nested too deeply"));
}

TEST_CASE("patterns that are wrong or not read are refused", "[io]") {
  CHECK_THAT(refusal("(a"), Contains("unbalanced '('"));
  CHECK_THAT(refusal("[a"), Contains("unbalanced '['"));
  CHECK_THAT(refusal("*a"), Contains("repetition of nothing"));
  CHECK_THAT(refusal("a**"), Contains("repetition of a repetition"));
  CHECK_THAT(refusal("(?=a)"), Contains("group that is not read"));
  CHECK_THAT(refusal("\\bup"), Contains("escape that is not read"));
  CHECK_THAT(refusal("(a)\\1"), Contains("escape that is not read"));
  CHECK_THAT(refusal("a{3,2}"), Contains("counts in the wrong order"));
  CHECK_THAT(refusal("a{5000}"), Contains("count above 1000"));
  CHECK_THAT(refusal("[z-a]"), Contains("range in the wrong order"));
  CHECK_THAT(refusal("[\\d-z]"), Contains("range between classes"));
  CHECK_THAT(refusal("a\\"), Contains("\\"));
}

TEST_CASE("configurations that PEFT wrote are read and written back byte for byte", "[io]") {
  for (const char* name : {"peft_tiny", "peft_tiny_rslora", "peft_tiny_dora"}) {
    CAPTURE(name);
    const std::string path = test_data(name) + "/adapter_config.json";
    const io::adapter_config config = io::read_adapter_config(path);
    CHECK(config.r == 4);
    CHECK(config.lora_alpha == 8);
    CHECK(config.lora_dropout == 0.1);
    CHECK(config.use_rslora == (std::string(name) == "peft_tiny_rslora"));
    CHECK(config.use_dora == (std::string(name) == "peft_tiny_dora"));
    CHECK(config.bias == "none");
    CHECK(config.target_modules == std::vector<std::string>{"conv", "embed", "q_proj", "up", "v_proj"});
    CHECK(config.rank_pattern == decltype(config.rank_pattern){{"blocks\\.1\\.attn\\.v_proj", 2}, {"conv", 3}});
    CHECK(config.alpha_pattern == decltype(config.alpha_pattern){{"blocks.0.attn.q_proj", 1.5}, {"up", 5}});
    CHECK(io::adapter_config_text(config) == contents(path));
  }
}

TEST_CASE("changed members and unknown keys are written", "[io]") {
  io::adapter_config config = parse(R"(,"future":{"deep":[1,2,{"x":null}]},"name":"é","lora_dropout":0.0)");
  config.r = 16;
  config.lora_alpha = 2.5;
  config.use_dora = true;
  config.rank_pattern = {{"a", 2}};
  config.target_modules = {"x", "y"};
  const auto again = io::parse_adapter_config(io::adapter_config_text(config));
  CHECK(again.r == 16);
  CHECK(again.lora_alpha == 2.5);
  CHECK(again.use_dora);
  CHECK(again.rank_pattern == config.rank_pattern);
  CHECK(again.target_modules == config.target_modules);
  CHECK(again.json.at("future") == config.json.at("future"));
  CHECK(again.json.at("name") == "é");
  CHECK_THAT(io::adapter_config_text(config), Contains("\"name\": \"\\u00e9\"") && Contains("\"lora_dropout\": 0.0"));
  config.bias = "\xff";
  CHECK(message_of<value_error>([&] { io::adapter_config_text(config); }) ==
        "mlkit::value_error: io::adapter_config_text: a string of the configuration is not valid UTF-8");
  const auto one = parse(R"(,"target_modules":"all-linear")");
  CHECK(one.target_modules_is_pattern);
  CHECK_THAT(io::adapter_config_text(one), Contains("\"target_modules\": \"all-linear\""));
}

TEST_CASE("configurations that are not what they should be are refused", "[io]") {
  CHECK_THAT(failure(""), Contains("is not JSON"));
  CHECK_THAT(failure("{\"r\":4"), Contains("is not JSON"));
  CHECK(failure("{\"r\":4,\"lora_alpha\":8,\"\xff\":1}") ==
        "mlkit::io_error: adapter_config.json: is not JSON: it is not valid UTF-8");
  CHECK_THAT(failure("[]"), Contains("is array, but an object was expected"));
  CHECK_THAT(failure("{}"), Contains("there is no \"r\""));
  CHECK_THAT(failure(R"({"r":4})"), Contains("there is no \"lora_alpha\""));
  CHECK_THAT(failure(R"({"peft_type":"LOHA","r":4,"lora_alpha":8})"), Contains("peft_type is \"LOHA\""));
  CHECK_THAT(failure(R"({"r":4,"r":8,"lora_alpha":8})"), Contains("\"r\" is given twice"));
  CHECK_THAT(failure(R"({"r":4,"lora_alpha":8,"x":[{"y":1,"y":2}]})"), Contains("\"y\" is given twice"));
  CHECK_THAT(failure(R"({"r":"4","lora_alpha":8})"), Contains("\"r\" is string, but an integer was expected"));
  CHECK_THAT(failure(R"({"r":4.5,"lora_alpha":8})"), Contains("\"r\" is number, but an integer"));
  CHECK_THAT(failure(R"({"r":0,"lora_alpha":8})"), Contains("\"r\" = 0, but a rank is positive"));
  CHECK_THAT(failure(R"({"r":18446744073709551615,"lora_alpha":8})"), Contains("\"r\" is too large"));
  CHECK_THAT(failure(R"({"r":4,"lora_alpha":1e999})"), Contains("is not JSON"));
  CHECK_THAT(failure(R"({"r":4,"lora_alpha":NaN})"), Contains("is not JSON"));
  CHECK_THAT(failure(R"({"r":4,"lora_alpha":null})"), Contains("\"lora_alpha\" is null, but a number"));
  const auto member = [&](const std::string& text) { return io_failure([&] { parse("," + text); }); };
  CHECK_THAT(member(R"("use_dora":1)"), Contains("\"use_dora\" is number, but a boolean"));
  CHECK_THAT(member(R"("lora_dropout":1.0)"), Contains("lora_dropout = 1 is outside [0, 1)"));
  CHECK_THAT(member(R"("rank_pattern":[])"), Contains("\"rank_pattern\" is array, but an object"));
  CHECK_THAT(member(R"("rank_pattern":{"a":-1})"), Contains("\"a\" = -1, but a rank is positive"));
  CHECK_THAT(member(R"("alpha_pattern":{"a":"b"})"), Contains("\"a\" is string, but a number"));
  CHECK_THAT(member(R"("target_modules":4)"), Contains("an array or a string"));
  CHECK_THAT(member(R"("target_modules":["a",4])"), Contains("an array of strings"));
  CHECK_THAT(member(R"("bias":false)"), Contains("\"bias\" is boolean, but a string"));
  CHECK_THAT(failure(std::string(5'000'000, '[')), Contains("deeper than 64"));
  CHECK_THAT(failure(R"({"r":4,"lora_alpha":8,"x":)" + std::string(65, '[') + std::string(65, ']') + "}"),
             Contains("deeper than 64"));
}
