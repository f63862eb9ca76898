// The byte-pair tokenizer: which merges are learnt, that every text comes back, and what a file of merges may hold.
#include <mlkit/nn/byte_pair_tokenizer.hpp>

#include <catch2/catch.hpp>
#include <fstream>
#include <mlkit/core/random.hpp>

#include "temporary_directory.hpp"

using Catch::Matchers::Contains;
using tokenizer = mlkit::nn::byte_pair_tokenizer;
using ids = std::vector<std::int32_t>;
using texts = std::vector<std::string>;

namespace {

std::int32_t byte(char c) { return tokenizer::first_byte + static_cast<unsigned char>(c); }
constexpr std::int32_t merged = tokenizer::first_merge;

}  // namespace

TEST_CASE("merges are learnt as in the paper's example", "[nn]") {
  // Sennrich et al. 2016, algorithm 1, whose words end with a token of their own: "low" 5 times, "lower" 2, "newest" 6,
  // "widest" 3 give es, est, (est with the end, which is none here,) lo, low.
  texts words;
  for (const auto& [word, uses] :
       std::initializer_list<std::pair<const char*, int>>{{"low", 5}, {"lower", 2}, {"newest", 6}, {"widest", 3}})
    for (int i = 0; i < uses; ++i) words.emplace_back(word);
  const auto t = tokenizer::from_texts(words, merged + 4);
  REQUIRE(t.merges().size() == 4);
  CHECK(t.merges()[0] == tokenizer::merge{byte('e'), byte('s')});
  CHECK(t.merges()[1] == tokenizer::merge{merged, byte('t')});
  CHECK(t.merges()[2] == tokenizer::merge{byte('l'), byte('o')});
  CHECK(t.merges()[3] == tokenizer::merge{merged + 2, byte('w')});
  CHECK(t.encode("lowest") == ids{merged + 3, merged + 1});
  CHECK(t.encode("slow") == ids{byte('s'), merged + 3});
  CHECK(t.size() == merged + 4);
}

TEST_CASE("merges do not depend on the order of texts, and stop where nothing is left", "[nn]") {
  const texts some{"in the beginning", "was the word", "and the word was"}, turned{some[2], some[0], some[1]};
  const auto t = tokenizer::from_texts(some, 400);
  CHECK(t.merges() == tokenizer::from_texts(turned, 400).merges());
  CHECK(t.size() < 400);
  CHECK(t.encode(" the") == ids{t.encode("in the")[t.encode("in").size()]});  // a word with its space is one token
  CHECK(tokenizer::from_texts(texts{}, 300).merges().empty());
  CHECK(tokenizer::from_texts(texts{"ab", "cd"}, 300).merges().empty());  // no pair occurs twice
  CHECK(tokenizer::from_texts(texts{"aaaa", "aaaa"}, 300).encode("aaaaa").size() == 2);
}

TEST_CASE("pieces are words with their space, numbers, punctuation and blanks", "[nn]") {
  // Texts whose pairs reach over pieces alone: nothing can be merged.
  for (const char* text : {"a1a1a1", "a.a.a.", "a\na\na\n", "1.1.1.", "a a a a", "  a  a"})
    CHECK(tokenizer::from_texts(texts{text}, 300).merges().size() <= 1);
  CHECK(tokenizer::from_texts(texts{" a a"}, 300).merges()[0] == tokenizer::merge{byte(' '), byte('a')});
}

TEST_CASE("every text comes back to the byte", "[nn]") {
  const auto t =
      tokenizer::from_texts(texts{"The quick brown fox; the quick brown fox.", "caf\xc3\xa9 caf\xc3\xa9"}, 290);
  for (const std::string text : {"", "the fox", "  two  spaces ", "\n\ttab 12.5e7", "caf\xc3\xa9", "\xff\xfe", " "})
    CHECK(t.decode(t.encode(text)) == text);
  for (std::uint64_t run = 0; run < 50; ++run) {
    std::string text;
    for (std::uint64_t i = 0; i < 40; ++i)
      text += static_cast<char>(mlkit::random_stream{run, 1}.bits(i) % (run % 2 ? 256 : 64) + (run % 2 ? 0 : 32));
    CHECK(t.decode(t.encode(text)) == text);
  }
  ids some = t.encode("fox");
  some.push_back(tokenizer::end);
  some.push_back(byte('x'));
  CHECK(t.decode(some) == "fox");  // nothing behind end
}

TEST_CASE("a file holds a merge to a line", "[nn]") {
  const temporary_directory directory;
  const std::string path = directory / "merges.txt";
  const auto t = tokenizer::from_texts(texts{"the word was the word"}, 270);
  t.save(path);
  CHECK(tokenizer::load(path).merges() == t.merges());
  const auto refused = [&](const std::string& text, int line) {
    std::ofstream(path, std::ios::binary) << text;
    CHECK_THROWS_WITH(tokenizer::load(path),
                      Contains("merges.txt, line " + std::to_string(line) + ": is no merge of two tokens"));
  };
  refused("5 6\n5\n", 2);
  refused("5 6\n7 8", 2);
  refused("5 257\n", 1);  // which it would make itself
  refused("0 5\n", 1);
  refused("5 6\n5 6\n", 2);
  refused("5  6\n", 1);
  refused("x", 1);
  std::ofstream(path, std::ios::binary) << "";
  CHECK(tokenizer::load(path).merges().empty());
  CHECK_THROWS_AS(tokenizer::load(directory / "none.txt"), mlkit::io_error);
}

TEST_CASE("a byte-pair tokenizer refuses what it cannot use", "[nn]") {
  CHECK_THROWS_WITH(tokenizer({{5, 257}}), Contains("merge 0 of 5 and 257: one is no token by then"));
  CHECK_THROWS_WITH(tokenizer({{5, 6}, {5, 6}}), Contains("merge 1 of 5 and 6 is there twice"));
  CHECK_THROWS_WITH(tokenizer::from_texts(texts{}, 256), Contains("size = 256 is less than the 257"));
  CHECK_THROWS_WITH(tokenizer({}).decode(ids{257}), Contains("id 257 is outside the vocabulary of 257"));
  CHECK_THROWS_WITH(tokenizer({}).decode(ids{-1}), Contains("id -1"));
}
