#include "preference.hpp"

#include <mlkit/nn/word_tokenizer.hpp>

#include <algorithm>
#include <cmath>

namespace examples {

word_list words_of(const std::string& text) { return mlkit::nn::word_tokenizer::split(text); }

double judge::reward(const std::string& text) const {
  constexpr int enough = 2;
  std::set<std::string> said;
  int tone = 0, again = 0;
  for (const std::string& word : words_of(text)) {
    const bool first = said.insert(word).second, warm = liked.contains(word);
    if (first) tone += warm ? 1 : disliked.contains(word) ? -1 : 0;
    again += warm && !first;
  }
  return std::min(tone, enough) - again;
}

bool judge::prefers(double first, double second, double uniform) const {
  return uniform < 1 / (1 + std::exp((second - first) / noise));
}

}  // namespace examples
