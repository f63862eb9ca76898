// Which words of a prompt the words of an edited prompt take their attention from.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "../core/error.hpp"

namespace MLKIT_NAMESPACE::attention {

/// A prompt's tokens, and the word that each is a part of: words count up from 0, and -1 are tokens that are of none
/// (the first and the last of CLIP's, padding). Without words every token is one by itself.
struct prompt {
  std::span<const std::int32_t> ids;
  std::span<const std::int32_t> words = {};
};

/// Tokens of a target prompt in terms of a source prompt's: of the attention that target token t takes from the source,
/// mapping[s * length + t] is the weight of source token s, and taken[t] says how much of t's attention is taken at
/// all; the rest is its own. Both prompts are padded to `length` tokens: attention's keys.
struct alignment {
  index_t length = 0;
  std::vector<float> mapping;  ///< [length, length], source by target
  std::vector<float> taken;    ///< [length]

  float& weight(index_t source, index_t target) { return mapping[static_cast<std::size_t>(source * length + target)]; }
  float weight(index_t source, index_t target) const {
    return mapping[static_cast<std::size_t>(source * length + target)];
  }
};

namespace detail {

using namespace mlkit::detail;

inline alignment empty_alignment(std::string_view function, index_t length, std::size_t source, std::size_t target) {
  if (length < 0) fail_value(function, ": length = ", length, " is negative");
  for (const auto& [name, size] : {std::pair{"source", source}, {"target", target}})
    if (std::cmp_greater(size, length))
      fail_shape(function, ": ", name, " has ", size, " tokens, but length is ", length);
  const auto count = static_cast<std::size_t>(length);
  return {length, std::vector<float>(count * count), std::vector<float>(count, 1.0f)};
}

// Word by word, the first token and the one after the last.
inline std::vector<std::pair<index_t, index_t>> spans_of_words(std::string_view function, std::string_view name,
                                                               const prompt& p) {
  std::vector<std::pair<index_t, index_t>> spans;
  const auto tokens = static_cast<index_t>(p.ids.size());
  if (!p.words.empty() && p.words.size() != p.ids.size())
    fail_shape(function, ": ", name, ".words has ", p.words.size(), " elements, but ", name, ".ids has ", p.ids.size());
  for (index_t i = 0; i < tokens; ++i) {
    const auto word = p.words.empty() ? i : static_cast<index_t>(p.words[static_cast<std::size_t>(i)]);
    if (word == -1) continue;
    const auto seen = static_cast<index_t>(spans.size());
    if (word == seen)
      spans.emplace_back(i, i + 1);
    else if (word == seen - 1 && spans.back().second == i)
      ++spans.back().second;
    else
      fail_value(function, ": ", name, ".words[", i, "] = ", word, " neither goes on with the word before nor is ",
                 seen, ", the next");
  }
  return spans;
}

}  // namespace detail

/// The same prompt: every token takes its own attention.
inline alignment align_same(index_t length) {
  alignment a = detail::empty_alignment("attention::align_same", length, 0, 0);
  for (index_t t = 0; t < length; ++t) a.weight(t, t) = 1;
  return a;
}

/// Prompts of as many words, some of which are others: each word takes the attention of the one in its place, token by
/// token where both have as many; else every token of the target's word takes the source's word in equal parts, 1 / its
/// number of tokens. What stands between replaced words keeps its order. Hertz et al., section 3.2, "Word Swap"; their
/// code has what follows the last replaced word take the same position instead, which is the same where words have as
/// many tokens. Throws value_error where prompts have not as many words.
inline alignment align_replaced(const prompt& source, const prompt& target, index_t length) {
  constexpr std::string_view function = "attention::align_replaced";
  alignment a = detail::empty_alignment(function, length, source.ids.size(), target.ids.size());
  const auto from = detail::spans_of_words(function, "source", source),
             to = detail::spans_of_words(function, "target", target);
  if (from.size() != to.size())
    detail::fail_value(function, ": source has ", from.size(), " words, but target has ", to.size());
  index_t i = 0, j = 0;
  const auto one_by_one = [&](index_t i_end, index_t j_end) {
    while (i < i_end && j < j_end) a.weight(i++, j++) = 1;
    i = i_end, j = j_end;
  };
  for (std::size_t w = 0; w < from.size(); ++w) {
    const auto [s, s_end] = from[w];
    const auto [t, t_end] = to[w];
    one_by_one(s, t);
    if (s_end - s == t_end - t) {
      one_by_one(s_end, t_end);
      continue;
    }
    for (; i < s_end; ++i)
      for (j = t; j < t_end; ++j) a.weight(i, j) = 1 / static_cast<float>(t_end - t);
    j = t_end;
  }
  one_by_one(length, length);
  return a;
}

/// Prompts that share tokens: those that both have, in order, take the source's attention; new ones keep their own
/// (taken 0), padding its position's. By Needleman and Wunsch: a match counts 1, a mismatch -1, a gap 0; of equals a
/// gap in the source is preferred, then one in the target. Hertz et al., section 3.2, "Adding a New Phrase", and their
/// code.
inline alignment align_refined(std::span<const std::int32_t> source, std::span<const std::int32_t> target,
                               index_t length) {
  alignment a = detail::empty_alignment("attention::align_refined", length, source.size(), target.size());
  const std::size_t n = source.size(), m = target.size(), row = m + 1;
  enum step : std::uint8_t { skip_target, skip_source, both };
  std::vector<index_t> score((n + 1) * row);
  std::vector<step> steps(score.size(), skip_target);
  for (std::size_t i = 1; i <= n; ++i) {
    steps[i * row] = skip_source;
    for (std::size_t j = 1; j <= m; ++j) {
      const index_t left = score[i * row + j - 1], up = score[(i - 1) * row + j],
                    diagonal = score[(i - 1) * row + j - 1] + (source[i - 1] == target[j - 1] ? 1 : -1);
      const index_t best = std::max({left, up, diagonal});
      score[i * row + j] = best;
      steps[i * row + j] = best == left ? skip_target : best == up ? skip_source : both;
    }
  }
  for (std::size_t i = n, j = m; i > 0 || j > 0;) {
    switch (steps[i * row + j]) {
      case skip_target: a.taken[--j] = 0; break;
      case skip_source: --i; break;
      case both: a.weight(static_cast<index_t>(--i), static_cast<index_t>(--j)) = 1; break;
    }
  }
  for (auto t = static_cast<index_t>(m); t < length; ++t) a.weight(t, t) = 1;
  return a;
}

}  // namespace MLKIT_NAMESPACE::attention
