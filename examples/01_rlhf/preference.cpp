#include "preference.hpp"

#include <mlkit/nn/word_tokenizer.hpp>

#include <cmath>
#include <set>

namespace examples {

namespace {

const std::set<std::string> gentle{"blessed",  "delight",   "glad", "good",  "help",  "hope",   "joy",
                                   "kindness", "light",     "love", "mercy", "peace", "praise", "praises",
                                   "rejoice",  "salvation", "save", "sing",  "trust", "truth",  "wisdom"};
const std::set<std::string> harsh{"afraid", "anger", "blood", "death",   "destroy",  "enemies",    "enemy",
                                  "evil",   "fire",  "fool",  "hate",    "iniquity", "perish",     "reproach",
                                  "shame",  "sin",   "sword", "trouble", "wicked",   "wickedness", "wrath"};

}  // namespace

word_list words_of(const std::string& text) { return mlkit::nn::word_tokenizer::split(text); }

double true_reward(const std::string& text) {
  constexpr int enough = 3;
  std::set<std::string> said;
  int tone = 0, again = 0;
  for (const std::string& word : words_of(text)) {
    const bool first = said.insert(word).second, warm = gentle.contains(word);
    tone += first ? (warm ? 1 : harsh.contains(word) ? -1 : 0) : 0;
    again += warm && !first;
  }
  return std::min(tone, enough) - again;
}

bool prefers(double reward, double other, double noise, double uniform) {
  return uniform < 1 / (1 + std::exp((other - reward) / noise));
}

}  // namespace examples
