// The word tokenizer: what is a word, which id it has, and what a file of words may hold.
#include <mlkit/nn/word_tokenizer.hpp>

#include <catch2/catch.hpp>
#include <fstream>

#include "temporary_directory.hpp"

using Catch::Matchers::Contains;
using ids = std::vector<std::int32_t>;
using tokenizer = mlkit::nn::word_tokenizer;
using words = std::vector<std::string>;

namespace {

void write(const std::string& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

}  // namespace

TEST_CASE("words are runs of letters and digits, lower-cased", "[nn]") {
  CHECK(tokenizer::split("A small, RED shield.") == words{"a", "small", "red", "shield"});
  CHECK(tokenizer::split("  16x16 item\t#3\n") == words{"16x16", "item", "3"});
  CHECK(tokenizer::split("caf\xc3\xa9-\xff") == words{"caf\xc3\xa9", "\xff"});  // also bytes that are no UTF-8
  CHECK(tokenizer::split("") == words{});
  CHECK(tokenizer::split(".,;") == words{});
  CHECK(tokenizer::split("@[`{/:") == words{});  // the neighbours of letters and digits in ASCII
}

TEST_CASE("a vocabulary has the most frequent words first, whatever the order of the texts", "[nn]") {
  const words texts{"a red coin", "a blue coin", "a red key"}, turned{texts[2], texts[0], texts[1]};
  const auto t = tokenizer::from_texts(texts);
  CHECK(t.words() == words{"a", "coin", "red", "blue", "key"});
  CHECK(tokenizer::from_texts(turned).words() == t.words());
  CHECK(t.size() == tokenizer::first_word + 5);
  CHECK(t.id("a") == tokenizer::first_word);
  CHECK(t.id("key") == tokenizer::first_word + 4);
  CHECK(t.id("sword") == tokenizer::unknown);
}

TEST_CASE("texts become ids between begin and end, and words again", "[nn]") {
  const tokenizer t(words{"a", "red", "coin"});
  CHECK(t.encode("A red coin!") == ids{1, 4, 5, 6, 2});
  CHECK(t.encode("") == ids{1, 2});
  CHECK(t.encode("a green coin") == ids{1, 4, 3, 6, 2});
  const words texts{"a coin", "", "red"};
  const auto all = t.encode(texts, 5);
  CHECK(all == ids{1, 4, 6, 2, 0, 1, 2, 0, 0, 0, 1, 5, 2, 0, 0});
  CHECK(t.decode(t.encode("A red, red coin")) == "a red red coin");
  CHECK(t.decode({all.data(), 5}) == "a coin");
  CHECK(t.decode(t.encode("a green coin")) == "a <unknown> coin");
  CHECK(t.decode(ids{1, 4, 2, 5}) == "a");  // nothing behind end
}

TEST_CASE("a vocabulary's file holds a word to a line", "[nn]") {
  const temporary_directory directory;
  const std::string path = directory / "words.txt";
  const tokenizer t(words{"a", "caf\xc3\xa9", "16"});
  t.save(path);
  CHECK(tokenizer::load(path).words() == t.words());
  CHECK(tokenizer::load(path).encode("a 16") == t.encode("a 16"));
  tokenizer({}).save(path);
  CHECK(tokenizer::load(path).words().empty());

  const auto refused = [&](const std::string& text, const std::string& why) {
    write(path, text);
    CHECK_THROWS_WITH(tokenizer::load(path), Contains("words.txt") && Contains(why));
  };
  refused("a\nred coin\n", "line 2: \"red coin\" is not a word");
  refused("a\n\n", "line 2: \"\" is not a word");
  refused("A\n", "line 1: \"A\" is not a word");
  refused("a\nb\na\n", "line 3: \"a\" is there twice");
  refused("a\nb", "line 2: does not end");
  CHECK_THROWS_AS(tokenizer::load(directory / "none.txt"), mlkit::io_error);
}

TEST_CASE("a tokenizer refuses what it cannot encode or decode", "[nn]") {
  CHECK_THROWS_WITH(tokenizer(words{"a", "Red"}), Contains("\"Red\" is not a word"));
  CHECK_THROWS_WITH(tokenizer(words{"a", "a"}), Contains("\"a\" is there twice"));
  const tokenizer t(words{"a"});
  const words texts{"a", "a a a"};
  CHECK_THROWS_WITH(t.encode(texts, 4), Contains("\"a a a\" needs 5 ids, but length is 4"));
  CHECK_THROWS_WITH(t.encode(texts, 1), Contains("length = 1"));
  CHECK_THROWS_WITH(t.decode(ids{5}), Contains("id 5 is outside the vocabulary of 5"));
  CHECK_THROWS_WITH(t.decode(ids{-1}), Contains("id -1"));
}
