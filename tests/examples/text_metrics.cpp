// BLEU and ROUGE-L of short texts beside NLTK 3.10.4 (sentence_bleu, SmoothingFunction.method2) and rouge-score 0.1.2.
#include <catch2/catch.hpp>
#include <sstream>

#include "common/text_metrics.hpp"

using namespace examples;

namespace {

word_list words(const std::string& text) {
  std::istringstream in(text);
  word_list list;
  for (std::string word; in >> word;) list.push_back(word);
  return list;
}

}  // namespace

TEST_CASE("BLEU and ROUGE-L are those of NLTK and rouge-score", "[examples]") {
  struct example {
    std::string text, reference;
    double bleu, rouge_l;
  };
  for (const example& e : {
           example{"the cat sat on the mat", "the cat is on the mat", 0.48549177170732344, 0.8333333333333334},
           {"praise ye the lord", "praise ye the lord all ye lands", 0.4723665527410147, 0.7272727272727273},
           {"the the the the", "the cat", 0.31947155212313627, 0.3333333333333333},
           {"a b c d e f g", "g f e d c b a", 0.2626909894424158, 0.14285714285714285},
           {"he is my shepherd", "he is my shepherd", 1, 1},
           {"one two three four five", "six one two seven three four five", 0.40505769908942735, 0.8333333333333333},
       }) {
    INFO(e.text << " | " << e.reference);
    CHECK(bleu(words(e.text), words(e.reference)) == Approx(e.bleu).epsilon(1e-12));
    CHECK(rouge_l(words(e.text), words(e.reference)) == Approx(e.rouge_l).epsilon(1e-12));
  }
  CHECK(bleu({}, words("a")) == 0);
  CHECK(rouge_l(words("a"), {}) == 0);
  CHECK(bleu(words("a b"), words("c d")) == 0);
}
