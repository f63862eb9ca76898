// What is preferred: the stand-in for a person, stated in full, and what it says of two texts.
#pragma once

#include "common/text_metrics.hpp"

#include <set>

namespace examples {

/// The words of a text, lower-cased.
word_list words_of(const std::string& text);

/// Stands in for a person who likes gentle verses. The reward model never sees the rewards below, only noisy
/// comparisons of two texts.
struct judge {
  std::set<std::string> liked{"blessed",  "delight",   "glad", "good",  "help",  "hope",   "joy",
                              "kindness", "light",     "love", "mercy", "peace", "praise", "praises",
                              "rejoice",  "salvation", "save", "sing",  "trust", "truth",  "wisdom"};
  std::set<std::string> disliked{"afraid", "anger", "blood", "death",   "destroy",  "enemies",    "enemy",
                                 "evil",   "fire",  "fool",  "hate",    "iniquity", "perish",     "reproach",
                                 "shame",  "sin",   "sword", "trouble", "wicked",   "wickedness", "wrath"};
  double noise = 0.5;

  /// The true reward of a text: one point for each different liked word, one off for each different disliked one, 2 at
  /// most in all, since more gushes; and one off for each liked word that is said again, and each word of any kind that
  /// is one of the two before it.
  double reward(const std::string& text) const;

  /// Whether the first of two texts is said to be better, from their true rewards: with probability
  /// sigmoid((first - second) / noise), as Bradley and Terry have it. `uniform` in [0, 1) decides.
  bool prefers(double first, double second, double uniform) const;
};

}  // namespace examples
