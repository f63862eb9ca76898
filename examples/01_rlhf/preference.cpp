#include "preference.hpp"

#include <mlkit/nn/word_tokenizer.hpp>

#include <algorithm>
#include <cmath>

namespace examples {

word_list words_of(const std::string& text) { return mlkit::nn::word_tokenizer::split(text); }

double judge::reward(const std::string& text) const {
  constexpr int enough = 2;
  const word_list words = words_of(text);
  std::set<std::string> said;
  int tone = 0, again = 0;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const bool first = said.insert(words[i]).second, warm = liked.contains(words[i]);
    const bool stutters = (i > 0 && words[i] == words[i - 1]) || (i > 1 && words[i] == words[i - 2]);
    if (first) tone += warm ? 1 : disliked.contains(words[i]) ? -1 : 0;
    again += stutters || (warm && !first);
  }
  return std::min(tone, enough) - again;
}

bool judge::prefers(double first, double second, double uniform) const {
  return uniform < 1 / (1 + std::exp((second - first) / noise));
}

}  // namespace examples
