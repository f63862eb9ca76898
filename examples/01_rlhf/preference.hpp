// What is preferred: the stand-in for a human, stated in full, and its noisy labels.
#pragma once

#include "common/text_metrics.hpp"

#include <cstdint>
#include <string>

namespace examples {

/// The words of a text, lower-cased.
word_list words_of(const std::string& text);

/// The true reward of a text, which stands in for a person who likes gentle verses and is shown none of the numbers
/// below; the reward model never sees it, only noisy comparisons. One point for each different gentle word, one off for
/// each different harsh one, both from the lists in preference.cpp, at most 3 in all: more gushes. And one off for each
/// gentle word that is said again.
double true_reward(const std::string& text);

/// Whether a person says that the first text is better: with the probability sigmoid((reward - other) / noise), Bradley
/// and Terry's. `uniform` in [0, 1) decides.
bool prefers(double reward, double other, double noise, double uniform);

}  // namespace examples
