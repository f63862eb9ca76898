#include "text_metrics.hpp"

#include <algorithm>
#include <cmath>
#include <map>

namespace examples {

double bleu(const word_list& text, const word_list& reference) {
  constexpr std::size_t longest = 4;
  if (text.empty() || reference.empty()) return 0;
  double sum = 0;
  for (std::size_t n = 1; n <= longest; ++n) {
    const auto runs = [n](const word_list& words) {
      std::map<word_list, int> counts;
      for (std::size_t i = 0; i + n <= words.size(); ++i)
        ++counts[word_list(words.begin() + static_cast<std::ptrdiff_t>(i),
                           words.begin() + static_cast<std::ptrdiff_t>(i + n))];
      return counts;
    };
    const auto of_reference = runs(reference);
    double found = n > 1, all = n > 1;
    for (const auto& [run, count] : runs(text)) {
      const auto it = of_reference.find(run);
      found += it == of_reference.end() ? 0 : std::min(count, it->second);
      all += count;
    }
    if (found == 0) return 0;
    sum += std::log(found / all);
  }
  const double ratio = static_cast<double>(reference.size()) / static_cast<double>(text.size());
  return std::exp(sum / longest + std::min(0.0, 1 - ratio));
}

double rouge_l(const word_list& text, const word_list& reference) {
  if (text.empty() || reference.empty()) return 0;
  std::vector<std::size_t> row(reference.size() + 1);  // of the table of common subsequences
  for (const std::string& word : text) {
    std::size_t before = 0;
    for (std::size_t j = 1; j <= reference.size(); ++j) {
      const std::size_t above = row[j];
      row[j] = word == reference[j - 1] ? before + 1 : std::max(above, row[j - 1]);
      before = above;
    }
  }
  return 2 * static_cast<double>(row.back()) / static_cast<double>(text.size() + reference.size());
}

}  // namespace examples
