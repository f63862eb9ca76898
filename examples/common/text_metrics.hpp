// How near a text is to a reference, by the words that they share: BLEU and ROUGE-L.
#pragma once

#include <string>
#include <vector>

namespace examples {

using word_list = std::vector<std::string>;

/// BLEU of one text: the geometric mean of the shares of its runs of 1 to 4 words that the reference has, each counted
/// as often as the reference has it at most, times exp(1 - reference length / length) where the text is shorter. Counts
/// of runs of two words and more are raised by one, so that a text without a common run of four is not 0 (Lin, Och,
/// "ORANGE", 2004). Papineni et al., "BLEU", 2002.
double bleu(const word_list& text, const word_list& reference);

/// ROUGE-L: F1 of the longest common subsequence, over the lengths of both. Lin, "ROUGE", 2004.
double rouge_l(const word_list& text, const word_list& reference);

}  // namespace examples
