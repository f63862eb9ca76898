// The denoiser of captioned images: gradients in f64 against central differences, and what its output depends on.
#include "common/text_denoiser.hpp"

#include <catch2/catch.hpp>
#include <limits>

using namespace examples;

namespace {

using ids = std::vector<std::int32_t>;
using values = std::vector<double>;
constexpr std::int32_t padding = nn::word_tokenizer::padding, begin = nn::word_tokenizer::begin,
                       end = nn::word_tokenizer::end;

constexpr text_denoiser_options tiny{.side = 4,
                                     .channels = 2,
                                     .patch = 2,
                                     .width = 6,
                                     .heads = 2,
                                     .blocks = 2,
                                     .words = 7,
                                     .length = 5,
                                     .text_width = 4,
                                     .text_heads = 2,
                                     .time_features = 4,
                                     .seed = 5};
constexpr std::int32_t known = 4, another = 5, unused = 6;
// Full, with a padded word, empty.
const ids captions{begin, known, another, known, end, begin, another, end, padding, padding, begin, end, 0, 0, 0};
const ids times{700, 30, 1000};

values images(std::size_t rows) {
  values x(rows * static_cast<std::size_t>(tiny.pixels()));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = mlkit::random_stream{2, 1}.normal(i);
  return x;
}

values output(const text_denoiser<double>& model, const values& x, const ids& t, const ids& words) {
  nn::tape<double> tape(mlkit::cpu{.threads = 2}, {.record = false});
  const auto y = model(nn::reshape(tape.constant(x), {static_cast<index_t>(t.size()), model.pixels()}), t, words);
  return {y.data(), y.data() + y.size()};
}
values output(const text_denoiser<double>& model, const ids& words = captions) {
  return output(model, images(times.size()), times, words);
}

// sum(output * weights), and its gradients where they are wanted.
double loss(const text_denoiser<double>& model, const ids& words, bool backward) {
  nn::tape<double> tape(mlkit::cpu{.threads = 2});
  values weights = images(times.size());
  std::reverse(weights.begin(), weights.end());
  const nn::shape all{static_cast<index_t>(times.size()), model.pixels()};
  const auto x = nn::reshape(tape.constant(images(times.size())), all);
  const auto total = nn::sum(model(x, times, words) * nn::reshape(tape.constant(weights), all));
  if (backward) tape.backward(total);
  return total.item();
}

void check_gradient(nn::parameter<double>& p, const text_denoiser<double>& model, const ids& words) {
  const index_t stride = 1 + p.size() / 16;
  for (index_t i = 0; i < p.size(); i += stride) {
    const double value = p.value(i), step = 1e-5;
    p.value(i) = value + step;
    const double above = loss(model, words, false);
    p.value(i) = value - step;
    const double below = loss(model, words, false);
    p.value(i) = value;
    const double numeric = (above - below) / (2 * step);
    INFO(p.name << " element " << i);
    REQUIRE(p.has_grad);
    CHECK(std::abs(p.grad(i) - numeric) / std::max(1.0, std::abs(numeric)) < 1e-7);
  }
}

ids with_word(std::int32_t from, std::int32_t to) {
  ids words = captions;
  std::replace(words.begin(), words.end(), from, to);
  return words;
}

}  // namespace

TEST_CASE("text denoiser: the gradient of every parameter", "[examples]") {
  text_denoiser<double> model(tiny);
  loss(model, captions, true);
  for (nn::parameter<double>& p : model.store()) check_gradient(p, model, captions);
}

TEST_CASE("text denoiser: padding does not matter", "[examples]") {
  text_denoiser<double> model(tiny);
  const values before = output(model);
  auto& words = model.store().at("text.words");
  std::fill_n(words.value.data() + padding * tiny.text_width, tiny.text_width,
              std::numeric_limits<double>::quiet_NaN());
  CHECK(output(model) == before);
}

TEST_CASE("text denoiser: words, their order and the time matter", "[examples]") {
  const text_denoiser<double> model(tiny);
  const values before = output(model);
  CHECK(output(model, with_word(known, unused)) != before);
  ids turned = captions;
  std::swap(turned[1], turned[2]);
  CHECK(output(model, turned) != before);
  CHECK(output(model, images(times.size()), {701, 30, 1000}, captions) != before);
}

TEST_CASE("text denoiser: a batch is each of its images alone", "[examples]") {
  const text_denoiser<double> model(tiny);
  const values all = output(model), x = images(times.size());
  const auto part = [](const auto& v, std::size_t i) {
    const auto size = static_cast<std::ptrdiff_t>(v.size() / times.size()), at = static_cast<std::ptrdiff_t>(i) * size;
    return std::remove_cvref_t<decltype(v)>(v.begin() + at, v.begin() + at + size);
  };
  for (std::size_t i = 0; i < times.size(); ++i) {
    const values alone = output(model, part(x, i), {times[i]}, part(captions, i)), together = part(all, i);
    for (std::size_t c = 0; c < alone.size(); ++c) CHECK(alone[c] == Approx(together[c]).epsilon(1e-12).margin(1e-12));
  }
}

TEST_CASE("text denoiser: an added word starts as another, and is all that is trained", "[examples]") {
  text_denoiser<double> model(tiny);
  const values before = output(model);
  nn::parameters<double> store;
  const std::int32_t word = model.add_word(store, known);
  const ids renamed = with_word(known, word);
  CHECK(word == tiny.words);
  CHECK(output(model) == before);
  CHECK(output(model, renamed) == before);

  model.store().freeze();
  loss(model, renamed, true);
  for (const nn::parameter<double>& p : model.store()) CHECK(!p.has_grad);
  REQUIRE(store.count() == 1);
  check_gradient(store.at("token"), model, renamed);

  store.at("token").value(0) += 1;
  CHECK(output(model) == before);
  CHECK(output(model, renamed) != before);
}

TEST_CASE("text denoiser: adapters start as the base, and reach the attention alone", "[examples]") {
  text_denoiser<double> model(tiny);
  const values before = output(model);
  nn::parameters<double> store(1);
  nn::adapt(model, store, {.rank = 2, .alpha = 4}, attention_targets);
  CHECK(store.count() == 2 * 4 * (1 + 2 * tiny.blocks));  // down and up of q, k, v, out; of the words and twice a block
  CHECK(output(model) == before);
  for (nn::parameter<double>& p : store)
    for (index_t i = 0; i < p.size(); ++i)
      p.value(i) = 0.1 * mlkit::random_stream{4, 1}.normal(static_cast<std::uint64_t>(i));
  CHECK(output(model) != before);
  model.each_linear([](auto& layer) { layer.set_strength(0); });
  CHECK(output(model) == before);
}
