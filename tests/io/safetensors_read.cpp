#include <catch2/catch.hpp>

#include "support.hpp"

#include <cmath>
#include <cstring>
#include <thread>

using namespace mlkit;
using Catch::Contains;

namespace {

// make_safetensors_fixtures.py: 0, 1, 0, 1 for bool; i for integers; (i - 3) / 4 for floats; byte i for 8-bit floats.
template <class T>
void check_view(const io::safetensors& file, const char* name) {
  const auto v = file.view<T, 2>(name);
  REQUIRE(v.extents == extents_t<2>{2, 3});
  for (index_t i = 0; i < 6; ++i) {
    const T value = v(i / 3, i % 3);
    if constexpr (std::is_integral_v<T>)
      CHECK(value == static_cast<T>(i));
    else
      CHECK(static_cast<double>(value) == static_cast<double>(i - 3) / 4);
  }
}

std::string failure(std::string_view header, std::size_t size, io::safetensors_options options = {}) {
  const auto bytes = file_of(header, size);
  return io_failure([&] { io::parse_safetensors(bytes, options); });
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape, std::size_t begin,
                  std::size_t end) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":[" +
         std::to_string(begin) + "," + std::to_string(end) + "]}";
}

}  // namespace

TEST_CASE("every dtype of the format is read in place", "[io]") {
  const auto file = io::safetensors::open(test_data("safetensors_dtypes.safetensors"));
  REQUIRE(file.size() == 19);
  check_view<float>(file, "f32");
  check_view<double>(file, "f64");
  check_view<bf16>(file, "bf16");
  check_view<f16>(file, "f16");
  check_view<std::int8_t>(file, "i8");
  check_view<std::int16_t>(file, "i16");
  check_view<std::int32_t>(file, "i32");
  check_view<std::int64_t>(file, "i64");
  check_view<std::uint8_t>(file, "u8");
  check_view<std::uint16_t>(file, "u16");
  check_view<std::uint32_t>(file, "u32");
  check_view<std::uint64_t>(file, "u64");
  const auto flags = file.view<std::uint8_t, 2>("bool");
  CHECK((flags(0, 0) == 0 && flags(0, 1) == 1 && flags(1, 2) == 1));
  CHECK(file.at("c64").bytes == 48);
  // No copy: the view points into the mapped file.
  CHECK(static_cast<const void*>(file.view<float, 2>("f32").data) == static_cast<const void*>(file.at("f32").data));
}

TEST_CASE("float tensors convert to any storage type", "[io]") {
  const auto file = io::safetensors::open(test_data("safetensors_dtypes.safetensors"));
  for (const char* name : {"f32", "f64", "f16", "bf16"}) {
    const auto single = file.tensor<float, 2>(name);
    const auto half = file.tensor<f16, 2>(name);
    const auto brain = file.tensor<bf16, 2>(name);
    const auto wide = file.tensor<double, 2>(name);
    for (index_t i = 0; i < 6; ++i) {
      const double expected = static_cast<double>(i - 3) / 4;
      CHECK(single(i / 3, i % 3) == expected);
      CHECK(half(i / 3, i % 3) == expected);
      CHECK(brain(i / 3, i % 3) == expected);
      CHECK(wide(i / 3, i % 3) == expected);
    }
  }
  CHECK_THAT(io_failure([&] { file.tensor<float, 2>("i32"); }), Contains("\"i32\" has dtype I32"));
  CHECK_THAT(io_failure([&] { file.view<float, 2>("f64"); }), Contains("\"f64\" has dtype F64, but F32 was asked for"));
  CHECK_THAT(io_failure([&] { file.view<float, 3>("f32"); }), Contains("shape [2, 3] of rank 2, but rank 3"));
  CHECK_THAT(io_failure([&] { file.at("none"); }), Contains("no tensor \"none\" among 19"));
  std::vector<float> small(5);
  CHECK_THAT(message_of<shape_error>([&] { file.at("f32").copy_to(std::span<float>(small)); }),
             Contains("has 6 elements, but the output has 5"));
}

TEST_CASE("8-bit floats decode as torch decodes them", "[io]") {
  const auto file = io::safetensors::open(test_data("safetensors_f8.safetensors"));
  for (const char* name : {"f8_e4m3", "f8_e5m2", "f8_e4m3fnuz", "f8_e5m2fnuz", "f8_e8m0"}) {
    CAPTURE(name);
    const auto decoded = file.tensor<float, 1>(name);
    const auto expected = file.view<float, 1>(std::string(name) + ".f32");
    for (index_t i = 0; i < 256; ++i) {
      CAPTURE(i);
      const float a = decoded(i), b = expected(i);
      CHECK(((std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b))));
    }
  }
}

TEST_CASE("scalars, empty tensors, odd names and metadata are read", "[io]") {
  const auto file = io::safetensors::open(test_data("safetensors_shapes.safetensors"));
  CHECK(file.metadata() == std::map<std::string, std::string>{{"format", "pt"}});
  CHECK(file.at("scalar").scalar() == 1.5);
  CHECK(file.at("scalar").rank() == 0);
  CHECK(*file.view<float, 0>("scalar").data == 1.5f);
  CHECK(file.view<float, 1>("empty").empty());
  CHECK(file.view<float, 3>("zero").extents == extents_t<3>{3, 0, 2});
  CHECK(file.tensor<float, 3>("zero").size() == 0);
  CHECK(file.view<float, 5>("five")(0, 1, 0, 2, 0) == 0.5f);
  CHECK(
      file.contains("quote\"back\\slash/tab\tline\nbell\x07"
                    "del\x7f"));
  CHECK(
      file.contains("gr\xc3\xb6\xc3\x9f"
                    "e_\xe9\x95\xb7\xe3\x81\x95_\xf0\x9f\x98\x80"));
  CHECK_THAT(io_failure([&] { file.at("b").scalar(); }), Contains("has 3 elements, but one was asked for"));
  CHECK(io::safetensors::open(test_data("safetensors_none.safetensors")).size() == 0);
}

TEST_CASE("names are decoded from every JSON escape", "[io]") {
  const auto bytes = file_of("{" + entry(R"(\u0061\"\\\/\b\f\n\r\t\u00e9\ud83d\ude00)", "U8", "[2]", 0, 2) + "}", 2);
  CHECK(io::parse_safetensors(bytes).tensors()[0].name == "a\"\\/\b\f\n\r\t\xc3\xa9\xf0\x9f\x98\x80");
}

TEST_CASE("names that are not UTF-8 are refused where they stand, and shown without their bad bytes", "[io]") {
  for (const char* name : {"\xff", "q\x80", "q\xc3", "\xc0\xaf", "\xe0\x80\xaf", "\xed\xb0\x80", "\xf4\x90\x80\x80"}) {
    const std::string header = "{" + entry(name, "U8", "[1]", 0, 1) + "}";
    const std::string at = std::to_string(header.find_first_of("\x80\xc0\xc3\xe0\xed\xf4\xff"));
    CHECK(failure(header, 1) == "mlkit::io_error: safetensors: header: byte " + at + ": a string is not valid UTF-8");
  }
  const auto bytes = file_of("{}", 0);
  CHECK_THAT(io_failure([&] { io::parse_safetensors(bytes).at("q\xff\n"); }), Contains("no tensor \"q??\" among 0"));
}

TEST_CASE("a tensor outlives its file and shares the mapping", "[io]") {
  const io::tensor_info kept = io::safetensors::open(test_data("safetensors_dtypes.safetensors")).at("f32");
  CHECK(kept.view<float, 2>()(0, 1) == -0.5f);
  // A file replaced by rename while it is mapped keeps its old contents for those who hold it.
  temporary_directory folder;
  const std::vector<float> one{1}, two{2};
  io::write_safetensors(folder / "x", {io::named("x", one)});
  const auto old = io::safetensors::open(folder / "x");
  io::write_safetensors(folder / "x", {io::named("x", two)});
  CHECK(old.view<float, 1>("x")(0) == 1);
  CHECK(io::safetensors::open(folder / "x").view<float, 1>("x")(0) == 2);
  CHECK(io::safetensors::open(folder / "x", {.map = false}).view<float, 1>("x")(0) == 2);
}

TEST_CASE("misaligned data is copied once, also under several threads", "[io]") {
  // Headers of every length modulo 8; most put the floats at odd addresses.
  for (std::size_t padding = 0; padding < 8; ++padding) {
    auto bytes = file_of("{" + entry("x", "F32", "[2]", 0, 8) + "}" + std::string(padding, ' '), 8);
    const float values[] = {1.25f, -3};
    std::memcpy(bytes.data() + bytes.size() - 8, values, 8);
    const auto file = io::parse_safetensors(bytes);
    const float* seen[2] = {};
    std::thread other([&] { seen[0] = file.view<float, 1>("x").data; });
    seen[1] = file.view<float, 1>("x").data;
    other.join();
    CHECK(seen[0] == seen[1]);
    CHECK(reinterpret_cast<std::uintptr_t>(seen[0]) % alignof(float) == 0);
    CHECK((seen[0][0] == 1.25f && seen[0][1] == -3));
    CHECK(file.tensor<double, 1>("x")(1) == -3);
  }
}

TEST_CASE("tensors may stand in the header in any order", "[io]") {
  const auto bytes = file_of("{" + entry("b", "U8", "[3]", 2, 5) + "," + entry("z", "U8", "[0]", 2, 2) + "," +
                                 entry("a", "U8", "[2]", 0, 2) + "}",
                             5);
  const auto file = io::parse_safetensors(bytes);
  CHECK(file.tensors()[0].name == "a");
  CHECK(file.tensors()[1].name == "z");
  CHECK(file.view<std::uint8_t, 1>("b")(0) == 2);
}

TEST_CASE("files that are cut short are refused at every length", "[io]") {
  const std::string whole = contents(test_data("safetensors_shapes.safetensors"));
  const auto* begin = reinterpret_cast<const std::byte*>(whole.data());
  REQUIRE_NOTHROW(io::parse_safetensors({begin, whole.size()}));
  for (std::size_t n = 0; n < whole.size(); ++n) {
    CAPTURE(n);
    CHECK_THROWS_AS(io::parse_safetensors({begin, n}), io_error);
  }
  CHECK_THAT(io_failure([&] { io::parse_safetensors({begin, 7}); }), Contains("has 7 bytes"));
  CHECK_THAT(io_failure([&] { io::parse_safetensors({begin, 100}); }), Contains("only 92 bytes follow"));
}

TEST_CASE("a header length that lies is refused", "[io]") {
  auto bytes = file_of("{}", 0);
  bytes[7] = std::byte{0xff};
  CHECK_THAT(io_failure([&] { io::parse_safetensors(bytes); }), Contains("above the limit of 100000000"));
  bytes[7] = std::byte{0};
  bytes[0] = std::byte{3};
  CHECK_THAT(io_failure([&] { io::parse_safetensors(bytes); }), Contains("is 3, but only 2 bytes follow"));
  bytes[0] = std::byte{0};
  CHECK_THAT(io_failure([&] { io::parse_safetensors(bytes); }), Contains("begins with '{'"));
  bytes[0] = std::byte{1};
  CHECK_THAT(io_failure([&] { io::parse_safetensors(bytes); }), Contains("expected a string, found the end"));
}

TEST_CASE("data that overlaps, has gaps or ends elsewhere is refused", "[io]") {
  CHECK_THAT(failure("{" + entry("a", "U8", "[4]", 0, 4) + "," + entry("b", "U8", "[4]", 3, 7) + "}", 7),
             Contains("\"b\" begins at byte 3, but the data before it ends at 4: they overlap"));
  CHECK_THAT(failure("{" + entry("a", "U8", "[4]", 0, 4) + "," + entry("b", "U8", "[4]", 5, 9) + "}", 9),
             Contains("\"b\" begins at byte 5, but the data before it ends at 4: there is a gap"));
  CHECK_THAT(failure("{" + entry("a", "U8", "[4]", 1, 5) + "}", 5), Contains("there is a gap"));
  CHECK_THAT(failure("{" + entry("lora_A.weight", "F32", "[1024]", 0, 4096) + "}", 2048),
             Contains("tensor \"lora_A.weight\" ends at byte 4096, the data has 2048"));
  const std::string short_header = "{" + entry("a", "U8", "[4]", 0, 4) + "}";
  CHECK_THAT(failure(short_header, 6), Contains("ends at byte 4, but the data has 6"));
  CHECK_THAT(failure("{}", 1), Contains("ends at byte 0, but the data has 1"));
  const auto trailing = file_of(short_header, 6);
  CHECK(io::parse_safetensors(trailing, {.trailing_bytes = true}).view<std::uint8_t, 1>("a")(3) == 3);
  CHECK_THAT(failure(short_header, 3, {.trailing_bytes = true}), Contains("ends at byte 4, the data has 3"));
}

TEST_CASE("sizes that do not follow from shape and dtype are refused", "[io]") {
  CHECK_THAT(failure("{" + entry("a", "F32", "[2,3]", 0, 20) + "}", 20),
             Contains("shape [2, 3] and dtype F32 takes 24 bytes, but its offsets [0, 20] span 20"));
  CHECK_THAT(failure("{" + entry("a", "F32", "[]", 0, 0) + "}", 0), Contains("takes 4 bytes"));
  CHECK_THAT(failure("{" + entry("a", "U8", "[0]", 0, 1) + "}", 1), Contains("takes 0 bytes"));
  CHECK_THAT(failure("{" + entry("a", "U8", "[2]", 2, 0) + "}", 2), Contains("ends at byte 0, before its begin at 2"));
  CHECK_THAT(failure("{" + entry("a", "F4", "[3]", 0, 1) + "}", 1), Contains("does not fill whole bytes"));
  // 2^32 * 2^32 wraps to 0 in 64 bits.
  CHECK_THAT(failure("{" + entry("a", "U8", "[4294967296,4294967296]", 0, 0) + "}", 0), Contains("is too large"));
  CHECK_THAT(failure("{" + entry("a", "U8", "[0,4611686018427387904,8]", 0, 0) + "}", 0), Contains("is too large"));
  CHECK_THAT(failure("{" + entry("a", "F64", "[9223372036854775807]", 0, 8) + "}", 8), Contains("is too large"));
  CHECK_THAT(failure("{" + entry("a", "U8", "[9223372036854775808]", 0, 0) + "}", 0), Contains("above 2^63 - 1"));
  CHECK_THAT(failure(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[18446744073709551615,0]}})", 1),
             Contains("above 2^63 - 1"));
  const auto packed = file_of("{" + entry("a", "F6_E2M3", "[2,2]", 0, 3) + "}", 3);
  CHECK(io::parse_safetensors(packed).at("a").bytes == 3);
}

TEST_CASE("names, dtypes and fields must be known and unique", "[io]") {
  CHECK_THAT(failure("{" + entry("a", "U8", "[1]", 0, 1) + "," + entry("\\u0061", "U8", "[1]", 1, 2) + "}", 2),
             Contains("\"a\" is given twice"));
  CHECK_THAT(failure("{" + entry("a", "F128", "[1]", 0, 16) + "}", 16), Contains("the unknown dtype \"F128\""));
  CHECK_THAT(failure("{" + entry("a", "f32", "[1]", 0, 4) + "}", 4), Contains("the unknown dtype \"f32\""));
  CHECK_THAT(failure(R"({"a":{"dtype":"U8","shape":[1]}})", 1), Contains("\"a\" has no data_offsets"));
  CHECK_THAT(failure(R"({"a":{"dtype":"U8","data_offsets":[0,1]}})", 1), Contains("\"a\" has no shape"));
  CHECK_THAT(failure(R"({"a":{"shape":[1],"data_offsets":[0,1]}})", 1), Contains("\"a\" has no dtype"));
  CHECK_THAT(failure(R"({"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1), Contains("twice"));
  CHECK_THAT(failure(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"strides":[1]}})", 1),
             Contains("the unknown field \"strides\""));
  CHECK_THAT(failure(R"({"__metadata__":{},"__metadata__":{}})", 0), Contains("\"__metadata__\" is given twice"));
  CHECK_THAT(failure(R"({"__metadata__":{"a":"1","a":"2"}})", 0), Contains("is given twice"));
  CHECK_THAT(failure(R"({"__metadata__":{"a":1}})", 0), Contains("expected a string"));
  CHECK_THAT(failure(R"({"__metadata__":null})", 0), Contains("expected '{'"));
}

TEST_CASE("a header that is not strict JSON is refused", "[io]") {
  for (const char* header : {"",
                             " {}",
                             "[]",
                             "{",
                             "}",
                             "{}{}",
                             "{},",
                             "{\"a\"}",
                             "{\"a\":}",
                             "{\"a\":1}",
                             "{\"a\":[]}",
                             "{\"a\":{}}",
                             "{,}",
                             "{\"__metadata__\":{},}",
                             "{\"__metadata__\":{\"a\":\"b\",}}",
                             "{'__metadata__':{}}",
                             "{\"__metadata__\":{\"a\":\"b}}",
                             "{\"__metadata__\":{\"a\":\"\\x\"}}",
                             "{\"__metadata__\":{\"a\":\"\\u12g4\"}}",
                             "{\"__metadata__\":{\"a\":\"\\ud800\"}}",
                             "{\"__metadata__\":{\"a\":\"\\ud800\\u0041\"}}",
                             "{\"__metadata__\":{\"a\":\"\\udc00\"}}",
                             "{\"__metadata__\":{\"a\":\"\t\"}}",
                             "{\"__metadata__\":{\"a\":\"\xff\"}}",
                             "{\"__metadata__\":{\"a\":\"\xc0\x80\"}}",
                             "{\"__metadata__\":{\"a\":\"\xed\xa0\x80\"}}",
                             "{\"__metadata__\":{\"a\":\"\xf4\x90\x80\x80\"}}",
                             "{\"__metadata__\":{\"a\":\"\xe2\x82\"}}",
                             "{/**/}",
                             "{\"__metadata__\":{}}x"}) {
    CAPTURE(header);
    const auto bytes = file_of(header, 0);
    CHECK_THROWS_AS(io::parse_safetensors(bytes), io_error);
  }
  for (const char* shape : {"[-1]", "[01]", "[1.0]", "[1e0]", "[+1]", "[\"1\"]", "[null]", "[1,]", "[,1]", "[1 1]", "1",
                            "{}", "[[1]]", "[0x1]"}) {
    CAPTURE(shape);
    const auto bytes = file_of("{" + entry("a", "U8", shape, 0, 1) + "}", 1);
    CHECK_THROWS_AS(io::parse_safetensors(bytes), io_error);
  }
  // Deep nesting costs no stack, wherever it stands.
  const std::string deep(5'000'000, '[');
  CHECK_THROWS_AS(io::parse_safetensors(file_of("{\"a\":" + deep, 0)), io_error);
  CHECK_THROWS_AS(io::parse_safetensors(file_of("{\"a\":{\"shape\":" + deep, 0)), io_error);
  const auto nul = file_of(std::string_view("{}\0", 3), 0);
  CHECK_THROWS_AS(io::parse_safetensors(nul), io_error);
  const auto spaced = file_of("{ \"__metadata__\" :\t{ \"a\" : \"b\" }\r\n } \n ", 0);
  CHECK(io::parse_safetensors(spaced).metadata().at("a") == "b");
}

TEST_CASE("what is not a regular file is refused", "[io]") {
  temporary_directory folder;
  CHECK_THAT(io_failure([&] { io::safetensors::open(folder / "none"); }), Contains("cannot open"));
  CHECK_THAT(io_failure([&] { io::safetensors::open(folder.path.string()); }), Contains("is not a regular file"));
  store(folder / "empty", "");
  CHECK_THAT(io_failure([&] { io::safetensors::open(folder / "empty"); }), Contains("empty: has 0 bytes"));
}
