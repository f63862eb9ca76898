// A byte-pair tokenizer: any text to ids, and back to the same bytes. Apart from nn.hpp, which touches no file.
#pragma once

#include <charconv>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "../core/error.hpp"
#include "../core/view.hpp"
#include "../io/detail/files.hpp"

namespace MLKIT_NAMESPACE::nn {

/// Texts to ids by byte pairs: a text is cut into pieces (a word with the space before it, a number, punctuation,
/// blanks), each piece starts as its bytes, and pairs of neighbours become one token in the order in which the merges
/// were learnt. Every text has ids, and decode gives the same bytes back. Sennrich, Haddow, Birch: "Neural machine
/// translation of rare words with subword units", 2016; over bytes: Radford et al., 2019 (GPT-2).
///
///     const auto tokenizer = nn::byte_pair_tokenizer::from_texts(texts, 1024);
///     tokenizer.encode("In the beginning");   // few ids, of frequent words one each
class byte_pair_tokenizer {
 public:
  static constexpr std::int32_t end = 0;                         ///< end of text, which no text is encoded to
  static constexpr std::int32_t first_byte = 1;                  ///< the id of byte 0
  static constexpr std::int32_t first_merge = first_byte + 256;  ///< the id of the first merge's token

  /// Two tokens that become one.
  using merge = std::pair<std::int32_t, std::int32_t>;

  /// Merge i makes token first_merge + i. Throws value_error for a token that is none by then, or a pair that is there
  /// twice.
  explicit byte_pair_tokenizer(const std::vector<merge>& merges) {
    for (const merge& m : merges) {
      const auto is_token = [&](std::int32_t id) { return id >= first_byte && id < size(); };
      if (!is_token(m.first) || !is_token(m.second))
        detail::fail_value("nn::byte_pair_tokenizer: merge ", merges_.size(), " of ", m.first, " and ", m.second,
                           ": one is no token by then");
      if (!add(m))
        detail::fail_value("nn::byte_pair_tokenizer: merge ", merges_.size(), " of ", m.first, " and ", m.second,
                           " is there twice");
    }
  }

  /// Learns merges from texts until there are `size` ids, or no pair is left that occurs twice: always the most
  /// frequent pair, of equally frequent ones that of the lower ids. Neither pieces nor pairs reach from one text to the
  /// next. Throws value_error for a size below that of the bytes alone.
  static byte_pair_tokenizer from_texts(std::span<const std::string> texts, index_t size) {
    if (size < first_merge)
      detail::fail_value("nn::byte_pair_tokenizer::from_texts: size = ", size, " is less than the ", first_merge,
                         " of end and the bytes");
    std::map<std::string_view, index_t> uses;
    for (const std::string& text : texts) for_pieces(text, [&](std::string_view piece) { ++uses[piece]; });
    struct counted {
      std::vector<std::int32_t> ids;
      index_t uses;
    };
    std::vector<counted> pieces;
    pair_table<index_t> pairs;
    for (const auto& [piece, count] : uses) {
      pieces.push_back({bytes_of(piece), count});
      const std::vector<std::int32_t>& ids = pieces.back().ids;
      for (std::size_t i = 1; i < ids.size(); ++i) pairs[{ids[i - 1], ids[i]}] += count;
    }
    byte_pair_tokenizer learnt({});
    while (learnt.size() < size) {
      merge best{};
      index_t most = 1;
      for (const auto& [pair, count] : pairs)
        if (count > most || (count == most && most > 1 && pair < best)) best = pair, most = count;
      if (most < 2) break;
      const auto token = static_cast<std::int32_t>(learnt.size());
      learnt.add(best);
      for (counted& piece : pieces) {
        if (!contains(piece.ids, best)) continue;
        const auto count = [&](index_t n) {
          for (std::size_t i = 1; i < piece.ids.size(); ++i) pairs[{piece.ids[i - 1], piece.ids[i]}] += n;
        };
        count(-piece.uses);
        join(piece.ids, best, token);
        count(piece.uses);
      }
      pairs.erase(best);
    }
    return learnt;
  }

  /// How many ids there are: what an embedding's table needs.
  index_t size() const noexcept { return first_merge + static_cast<index_t>(merges_.size()); }
  const std::vector<merge>& merges() const noexcept { return merges_; }

  /// The ids of a text, without end.
  std::vector<std::int32_t> encode(std::string_view text) const {
    std::vector<std::int32_t> all;
    for_pieces(text, [&](std::string_view piece) {
      std::vector<std::int32_t> ids = bytes_of(piece);
      for (;;) {  // the earliest merge first
        auto first = tokens_.end();
        for (std::size_t i = 1; i < ids.size(); ++i)
          if (const auto it = tokens_.find({ids[i - 1], ids[i]});
              it != tokens_.end() && (first == tokens_.end() || it->second < first->second))
            first = it;
        if (first == tokens_.end()) break;
        join(ids, first->first, first->second);
      }
      all.insert(all.end(), ids.begin(), ids.end());
    });
    return all;
  }

  /// The text of ids up to end. Throws value_error for an id that is none.
  std::string decode(std::span<const std::int32_t> ids) const {
    std::string text;
    for (const std::int32_t id : ids) {
      if (id < 0 || id >= size())
        detail::fail_value("nn::byte_pair_tokenizer::decode: id ", id, " is outside the vocabulary of ", size());
      if (id == end) break;
      append(id, text);
    }
    return text;
  }

  /// Writes a text file, a merge to a line: its two ids. Throws io_error where the system refuses; the file appears
  /// whole or not at all.
  void save(const std::string& path) const {
    std::string text;
    for (const merge& m : merges_) text += std::to_string(m.first) + " " + std::to_string(m.second) + "\n";
    detail::file_replacement file(path);
    file.write(text.data(), text.size());
    file.commit();
  }

  /// Reads what save wrote. Throws io_error, naming the line, for anything else.
  static byte_pair_tokenizer load(const std::string& path) {
    const auto file = detail::load_file(path, false);
    const char* at = reinterpret_cast<const char*>(file->bytes().data());
    const char* const stop = at + file->bytes().size();
    byte_pair_tokenizer read({});
    while (at != stop) {
      merge m;
      const auto number = [&](std::int32_t& id, char after) {
        const auto [next, error] = std::from_chars(at, stop, id);
        const bool good =
            error == std::errc{} && next != stop && *next == after && id >= first_byte && id < read.size();
        at = good ? next + 1 : at;
        return good;
      };
      if (!number(m.first, ' ') || !number(m.second, '\n') || !read.add(m))
        detail::fail_io(path, ", line ", read.merges_.size() + 1, ": is no merge of two tokens");
    }
    return read;
  }

 private:
  struct pair_hash {
    std::size_t operator()(const merge& m) const noexcept {
      const auto key = static_cast<std::uint64_t>(m.first) << 32 | static_cast<std::uint32_t>(m.second);
      return static_cast<std::size_t>((key * 0x9E3779B97F4A7C15u) >> 20);
    }
  };
  template <class V>
  using pair_table = std::unordered_map<merge, V, pair_hash>;

  bool add(const merge& m) {
    if (!tokens_.emplace(m, static_cast<std::int32_t>(size())).second) return false;
    merges_.push_back(m);
    return true;
  }

  void append(std::int32_t id, std::string& text) const {
    if (id < first_merge) {
      text += static_cast<char>(id - first_byte);
    } else {
      const merge& m = merges_[static_cast<std::size_t>(id - first_merge)];
      append(m.first, text);
      append(m.second, text);
    }
  }

  static std::vector<std::int32_t> bytes_of(std::string_view piece) {
    std::vector<std::int32_t> ids;
    ids.reserve(piece.size());
    for (const char c : piece) ids.push_back(first_byte + static_cast<unsigned char>(c));
    return ids;
  }
  static bool contains(const std::vector<std::int32_t>& ids, const merge& m) noexcept {
    for (std::size_t i = 1; i < ids.size(); ++i)
      if (ids[i - 1] == m.first && ids[i] == m.second) return true;
    return false;
  }
  // Every m in ids, from the left, becomes `token`.
  static void join(std::vector<std::int32_t>& ids, const merge& m, std::int32_t token) noexcept {
    std::size_t to = 0;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const bool joined = i + 1 < ids.size() && ids[i] == m.first && ids[i + 1] == m.second;
      ids[to++] = joined ? token : ids[i];
      i += joined;
    }
    ids.resize(to);
  }

  enum class kind { letter, digit, blank, other };
  static kind kind_of(char c) noexcept {
    if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || static_cast<unsigned char>(c) >= 0x80) return kind::letter;
    if (c >= '0' && c <= '9') return kind::digit;
    return c == ' ' || (c >= '\t' && c <= '\r') ? kind::blank : kind::other;
  }
  // f(piece) for the pieces of a text, which together are the text: runs of one kind, a single space joined to what
  // follows it.
  template <class F>
  static void for_pieces(std::string_view text, const F& f) {
    while (!text.empty()) {
      std::size_t n = text[0] == ' ' && text.size() > 1 && kind_of(text[1]) != kind::blank ? 2 : 1;
      const kind k = kind_of(text[n - 1]);
      while (n < text.size() && kind_of(text[n]) == k &&
             !(k == kind::blank && text[n] == ' ' && n + 1 < text.size() && kind_of(text[n + 1]) != kind::blank))
        ++n;
      f(text.substr(0, n));
      text.remove_prefix(n);
    }
  }

  std::vector<merge> merges_;
  pair_table<std::int32_t> tokens_;
};

}  // namespace MLKIT_NAMESPACE::nn
