// A small word tokenizer: captions to ids, and back. Apart from nn.hpp, which touches no file.
#pragma once

#include <algorithm>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "../core/error.hpp"
#include "../io/detail/files.hpp"

namespace MLKIT_NAMESPACE::nn {

/// Words to ids. A word is a run of ASCII letters and digits and of bytes beyond ASCII; letters are lower-cased, and
/// everything else only separates.
///
///     const auto tokenizer = nn::word_tokenizer::from_texts(captions);
///     tokenizer.encode("A red shield.");   // {begin, id of "a", id of "red", id of "shield", end}
class word_tokenizer {
 public:
  static constexpr std::int32_t padding = 0, begin = 1, end = 2, unknown = 3;
  static constexpr std::int32_t first_word = 4;  ///< the id of the first word of the vocabulary

  /// The words of ids first_word, first_word + 1, ... Throws value_error for a word that split would not leave as it
  /// is, or that is there twice.
  explicit word_tokenizer(std::vector<std::string> words) : words_(std::move(words)) {
    for (std::size_t i = 0; i < words_.size(); ++i) {
      if (split(words_[i]) != std::vector{words_[i]})
        detail::fail_value("nn::word_tokenizer: \"", words_[i], "\" is not a word");
      if (!ids_.emplace(words_[i], first_word + static_cast<std::int32_t>(i)).second)
        detail::fail_value("nn::word_tokenizer: \"", words_[i], "\" is there twice");
    }
  }

  /// The words of texts, the most frequent first and equally frequent ones in the order of their bytes, so that the
  /// order of the texts does not matter.
  static word_tokenizer from_texts(std::span<const std::string> texts) {
    std::map<std::string, index_t> uses;
    for (const std::string& text : texts)
      for (std::string& word : split(text)) ++uses[std::move(word)];
    std::vector<std::string> words;
    words.reserve(uses.size());
    for (const auto& use : uses) words.push_back(use.first);
    std::stable_sort(words.begin(), words.end(),
                     [&](const std::string& a, const std::string& b) { return uses[a] > uses[b]; });
    return word_tokenizer(std::move(words));
  }

  /// How many ids there are: what an embedding's table needs.
  index_t size() const noexcept { return first_word + static_cast<index_t>(words_.size()); }
  const std::vector<std::string>& words() const noexcept { return words_; }

  /// The words of a text, as the vocabulary has them.
  static std::vector<std::string> split(std::string_view text) {
    std::vector<std::string> words;
    bool inside = false;
    for (char c : text) {
      if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
      const bool joins = (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || static_cast<unsigned char>(c) >= 0x80;
      if (joins && !inside) words.emplace_back();
      if (joins) words.back() += c;
      inside = joins;
    }
    return words;
  }

  /// The id of a word as split gives it; unknown, if the vocabulary does not have it.
  std::int32_t id(std::string_view word) const {
    const auto it = ids_.find(word);
    return it == ids_.end() ? unknown : it->second;
  }

  /// begin, the ids of the text's words, end.
  std::vector<std::int32_t> encode(std::string_view text) const {
    std::vector<std::int32_t> ids{begin};
    for (const std::string& word : split(text)) ids.push_back(id(word));
    ids.push_back(end);
    return ids;
  }
  /// The same for several texts, one after another, each padded to `length`: a matrix [texts, length]. Throws
  /// value_error for a text that is longer, begin and end included.
  std::vector<std::int32_t> encode(std::span<const std::string> texts, index_t length) const {
    if (length < 2) detail::fail_value("nn::word_tokenizer::encode: length = ", length, " is less than 2");
    std::vector<std::int32_t> all;
    for (std::size_t i = 0; i < texts.size(); ++i) {
      const auto ids = encode(texts[i]);
      if (static_cast<index_t>(ids.size()) > length)
        detail::fail_value("nn::word_tokenizer::encode: \"", texts[i], "\" needs ", ids.size(), " ids, but length is ",
                           length);
      all.insert(all.end(), ids.begin(), ids.end());
      all.resize((i + 1) * static_cast<std::size_t>(length), padding);
    }
    return all;
  }

  /// The words of ids up to end, joined by spaces, without begin and padding; an unknown one is "<unknown>".
  /// Throws value_error for an id that is none.
  std::string decode(std::span<const std::int32_t> ids) const {
    std::string text;
    for (const std::int32_t id : ids) {
      if (id < 0 || id >= size())
        detail::fail_value("nn::word_tokenizer::decode: id ", id, " is outside the vocabulary of ", size());
      if (id == end) break;
      if (id == padding || id == begin) continue;
      if (!text.empty()) text += ' ';
      text += id == unknown ? "<unknown>" : words_[static_cast<std::size_t>(id - first_word)];
    }
    return text;
  }

  /// Writes a text file, a word to a line. Throws io_error where the system refuses; the file appears whole or not at
  /// all.
  void save(const std::string& path) const {
    std::string text;
    for (const std::string& word : words_) text += word + "\n";
    detail::file_replacement file(path);
    file.write(text.data(), text.size());
    file.commit();
  }

  /// Reads what save wrote. Throws io_error, naming the line, for anything else.
  static word_tokenizer load(const std::string& path) {
    const auto file = detail::load_file(path, false);
    std::string_view rest(reinterpret_cast<const char*>(file->bytes().data()), file->bytes().size());
    word_tokenizer read({});
    while (!rest.empty()) {
      const auto fail = [&](const auto&... what) {
        detail::fail_io(path, ", line ", read.words_.size() + 1, ": ", what...);
      };
      const std::size_t length = rest.find('\n');
      if (length == std::string_view::npos) fail("does not end");
      const std::string word(rest.substr(0, length));
      rest.remove_prefix(length + 1);
      if (split(word) != std::vector{word}) fail("\"", word, "\" is not a word");
      if (!read.ids_.emplace(word, static_cast<std::int32_t>(read.size())).second)
        fail("\"", word, "\" is there twice");
      read.words_.push_back(word);
    }
    return read;
  }

 private:
  std::vector<std::string> words_;
  std::map<std::string, std::int32_t, std::less<>> ids_;
};

}  // namespace MLKIT_NAMESPACE::nn
