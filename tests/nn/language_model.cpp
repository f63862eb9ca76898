// The language model against transformers, its cache against itself without one, packing, choosing tokens, training.
// All in f64: adapters of linear layers take long to compile for each type.
#include <mlkit/nn/generate.hpp>
#include <mlkit/nn/language_training.hpp>

#include <catch2/catch.hpp>

#include "fixtures.hpp"

namespace nn = mlkit::nn;
using Catch::Matchers::Contains;
using mlkit::index_t;
using ids = std::vector<std::int32_t>;
using model = nn::language_model<double>;
using tape = nn::tape<double>;

namespace {

const std::vector<double>& expected(const std::string& name) {
  return fixture("model." + name, "language_fixtures.txt");
}
ids integers(const std::string& name) {
  const auto& values = expected(name);
  return {values.begin(), values.end()};
}
double largest_difference(const double* have, const double* want, std::size_t n) {
  double high = 0;
  for (std::size_t i = 0; i < n; ++i) high = std::max(high, std::abs(have[i] - want[i]));
  return high;
}

nn::language_model_options grouped() {
  return {.vocabulary = 13, .context = 12, .width = 16, .heads = 4, .kv_heads = 2, .blocks = 2, .seed = 3};
}

// Sets every parameter to something that matters: norms start at 1 and biases at 0.
void scatter(nn::parameters<double>& store) {
  std::uint64_t stream = 0;
  for (nn::parameter<double>& p : store) {
    ++stream;
    for (index_t i = 0; i < p.size(); ++i)
      p.value(i) += 0.2 * mlkit::random_stream{9, stream}.normal(static_cast<std::uint64_t>(i));
  }
}

std::vector<double> logits_of(const model& m, const ids& of, index_t batch, const ids& documents = {}) {
  tape t({}, {.record = false});
  const auto z = m(t, of, batch, documents);
  return {z.data(), z.data() + z.size()};
}

constexpr double infinity = std::numeric_limits<double>::infinity();

nn::choice choose(const std::vector<double>& logits, const ids& text, const nn::choice_options& o, double u) {
  return nn::choose<double>(logits, text, o, u);
}

// The tokens that a fine grid of numbers draws, with the share of each.
std::map<std::int32_t, double> drawn(const std::vector<double>& logits, const nn::choice_options& o) {
  constexpr int grid = 1000;
  std::map<std::int32_t, double> shares;
  for (int i = 0; i < grid; ++i) shares[choose(logits, {}, o, (i + 0.5) / grid).id] += 1.0 / grid;
  return shares;
}

std::vector<double> logs(std::vector<double> p) {
  for (double& v : p) v = std::log(v);
  return p;
}

const nn::language_model_options small{
    .vocabulary = 17, .context = 24, .width = 16, .heads = 2, .blocks = 2, .seed = 5};

// log softmax(logits / temperature) of the last row of a text.
std::vector<double> log_probs(const model& m, const ids& text, double temperature) {
  tape t({}, {.record = false});
  const auto z = m(t, text, 1);
  std::vector<double> p(z.data() + z.size() - z.columns(), z.data() + z.size());
  double sum = 0;
  for (double& v : p) sum += std::exp(v /= temperature);
  for (double& v : p) v -= std::log(sum);
  return p;
}

}  // namespace

TEST_CASE("logits, loss and gradients are those of GPT-NeoX in transformers", "[nn]") {
  model m({.vocabulary = 11,
           .context = 16,
           .width = 8,
           .heads = 2,
           .blocks = 2,
           .hidden = 12,
           .tied = false,
           .rotary_base = 100});
  for (nn::parameter<double>& p : m.store()) {
    const auto& value = expected(p.name);
    REQUIRE(static_cast<index_t>(value.size()) == p.size());
    std::copy(value.begin(), value.end(), p.value.begin());
  }
  const ids of = integers("ids"), given = integers("labels");
  ids labels;
  for (std::size_t row = 0; row < 2; ++row) {
    labels.insert(labels.end(), given.begin() + static_cast<std::ptrdiff_t>(row * 5),
                  given.begin() + static_cast<std::ptrdiff_t>(row * 5 + 5));
    labels.push_back(nn::ignore_label);
  }
  tape t;
  const auto z = m(t, of, 2);
  CHECK(largest_difference(z.data(), expected("logits").data(), 132) < 1e-12);
  const auto loss = nn::cross_entropy<double>(z, labels);
  CHECK(loss.item() == Approx(expected("loss")[0]).epsilon(1e-13));
  t.backward(loss);
  for (nn::parameter<double>& p : m.store()) {
    INFO(p.name);
    CHECK(largest_difference(p.grad.data(), expected("d." + p.name).data(), static_cast<std::size_t>(p.size())) <
          1e-12);
  }
}

TEST_CASE("gradients of a packed text with grouped queries and a tied head", "[nn]") {
  model m(grouped());
  scatter(m.store());
  nn::packed_texts pack;
  pack.add({.ids = {1, 4, 2, 9, 0}, .prompt = 2});
  pack.add({.ids = {7, 7, 3, 12}});
  const auto loss = [&](bool backward) {
    tape t(mlkit::cpu{.threads = 2});
    const auto l = nn::cross_entropy<double>(m(t, pack.ids, 1, pack.documents), pack.labels);
    if (backward) t.backward(l);
    return l.item();
  };
  loss(true);
  double high = 0;
  for (nn::parameter<double>& p : m.store())
    for (index_t i = 0; i < p.size(); i += 1 + p.size() / 24) {
      const double x = p.value(i), step = 1e-5;
      p.value(i) = x + step;
      const double above = loss(false);
      p.value(i) = x - step;
      const double below = loss(false);
      p.value(i) = x;
      const double numeric = (above - below) / (2 * step);
      high = std::max(high, std::abs(p.grad(i) - numeric) / std::max(1.0, std::abs(numeric)));
    }
  CHECK(high < 1e-8);
}

TEST_CASE("logits over the cache are those without it", "[nn]") {
  for (const bool adapted : {false, true}) {
    model m(grouped());
    scatter(m.store());
    nn::parameters<double> adapters(1);
    if (adapted) {
      nn::adapt(m, adapters, {.rank = 2}, {"q_proj", "v_proj", "down_proj"});
      scatter(adapters);
    }
    // Texts of 9, 6 and 8 tokens, of which 4, 1 and 3 are the prompt; padding is any id.
    const std::vector<ids> texts{{1, 5, 2, 12, 4, 4, 0, 3, 9}, {8, 8, 1, 2, 3, 0}, {11, 0, 7, 6, 5, 4, 3, 2}};
    const ids prompts{1, 5, 2, 12, 8, 3, 3, 3, 11, 0, 7, 12}, lengths{4, 1, 3};
    nn::kv_cache<double> cache(m.options(), 3, 9);
    tape t({}, {.record = false});
    std::vector<std::vector<double>> alone;
    for (const ids& text : texts) alone.push_back(logits_of(m, text, 1));
    const auto check = [&](std::size_t b, std::size_t place, const double* z) {
      CHECK(largest_difference(z, alone[b].data() + place * 13, 13) < 1e-12);
    };
    auto z = m.logits(m.prefill(t, prompts, lengths, cache));
    for (std::size_t b = 0; b < 3; ++b)
      for (std::size_t i = 0; i < static_cast<std::size_t>(lengths[b]); ++i) check(b, i, z.data() + (b * 4 + i) * 13);
    const auto steps = [&] {
      for (std::size_t step = 0; step < 5; ++step) {
        ids next;
        for (std::size_t b = 0; b < 3; ++b) next.push_back(texts[b][static_cast<std::size_t>(cache.lengths()[b])]);
        z = m.logits(m.next(t, next, cache));
        for (std::size_t b = 0; b < 3; ++b)
          check(b, static_cast<std::size_t>(cache.lengths()[b] - 1), z.data() + b * 13);
      }
    };
    steps();
    CHECK(std::vector(cache.lengths().begin(), cache.lengths().end()) == ids{9, 6, 8});
    cache.truncate(lengths);  // and the same again from there
    steps();
  }
}

TEST_CASE("packed texts do not see each other", "[nn]") {
  model m(grouped());
  scatter(m.store());
  nn::packed_texts pack;
  std::vector<double> alone;
  for (const ids& text : {ids{1, 5, 2, 12}, ids{8}, ids{11, 0, 7, 6, 5, 4, 3}}) {
    pack.add({.ids = text});
    const auto z = logits_of(m, text, 1);
    alone.insert(alone.end(), z.begin(), z.end());
  }
  const auto z = logits_of(m, pack.ids, 1, pack.documents);
  CHECK(largest_difference(z.data(), alone.data(), alone.size()) < 1e-12);
  // Two packed sequences side by side; 12 tokens to a text are the context, which a pack may exceed.
  ids twice = pack.ids, documents = pack.documents;
  twice.insert(twice.end(), pack.ids.begin(), pack.ids.end());
  documents.insert(documents.end(), pack.documents.begin(), pack.documents.end());
  const auto both = logits_of(m, twice, 2, documents);
  CHECK(largest_difference(both.data() + alone.size(), alone.data(), alone.size()) < 1e-12);
  for (std::int32_t& d : documents) d += 5;  // numbers only have to grow
  for (std::size_t i = 12; i < 24; ++i) documents[i] += 10;
  CHECK(largest_difference(logits_of(m, twice, 1, documents).data(), both.data(), both.size()) < 1e-12);
}

TEST_CASE("padding behind a text changes no bit before it", "[nn]") {
  model m(grouped());
  scatter(m.store());
  ids a{1, 5, 2, 12, 0, 0, 8, 1, 3, 3, 3, 3}, b = a;
  b[4] = 9, b[5] = 10, b[8] = 0, b[11] = 1;
  const auto za = logits_of(m, a, 2), zb = logits_of(m, b, 2);
  CHECK(std::equal(za.begin(), za.begin() + 4 * 13, zb.begin()));
  CHECK(std::equal(za.begin() + 6 * 13, za.begin() + 8 * 13, zb.begin() + 6 * 13));
  CHECK_FALSE(std::equal(za.begin() + 8 * 13, za.end(), zb.begin() + 8 * 13));
}

TEST_CASE("a pack's labels leave out prompts and ends", "[nn]") {
  constexpr std::int32_t none = nn::ignore_label;
  nn::packed_texts pack;
  pack.add({.ids = {1, 4, 2, 9, 0}, .prompt = 3});
  pack.add({.ids = {7}});
  pack.add({.ids = {5, 6}});
  CHECK(pack.ids == ids{1, 4, 2, 9, 0, 7, 5, 6});
  CHECK(pack.labels == ids{none, none, 9, 0, none, none, 6, none});
  CHECK(pack.documents == ids{0, 0, 0, 0, 0, 1, 2, 2});
  CHECK(pack.learnt == 3);
  CHECK_THROWS_WITH(pack.add({.ids = {}}), Contains("prompt = 1 is outside [1, 0]"));
  CHECK_THROWS_WITH(pack.add({.ids = {1, 2}, .prompt = 0}), Contains("prompt = 0 is outside [1, 2]"));
}

TEST_CASE("a language model refuses what does not fit", "[nn]") {
  const auto refused = [](auto change, const std::string& why) {
    nn::language_model_options o = grouped();
    change(o);
    CHECK_THROWS_WITH(model(o), Contains(why));
  };
  refused([](auto& o) { o.vocabulary = 0; }, "vocabulary = 0 is not positive");
  refused([](auto& o) { o.width = 12; }, "width = 12 is not an even number for each of 4 heads");
  refused([](auto& o) { o.kv_heads = 3; }, "kv_heads = 3 does not divide 4 heads");
  refused([](auto& o) { o.hidden = -1; }, "hidden = -1 is negative");

  model m(grouped());
  tape t({}, {.record = false});
  CHECK_THROWS_WITH(m.hidden(t, ids{1, 2, 3}, 2), Contains("3 ids do not fill a batch of 2"));
  CHECK_THROWS_WITH(m.hidden(t, ids{}, 1), Contains("0 ids do not fill"));
  CHECK_THROWS_WITH(m.hidden(t, ids{1, 13}, 1), Contains("id 13 at place 1"));
  CHECK_THROWS_WITH(m.hidden(t, ids(13, 1), 1), Contains("a text has 13 tokens, but the context is 12"));
  CHECK_THROWS_WITH(m.hidden(t, ids{1, 2}, 1, ids{0}), Contains("documents has 1 elements"));
  CHECK_THROWS_WITH(m.hidden(t, ids{1, 2}, 1, ids{1, 0}), Contains("documents[1] = 0 is below its predecessor, 1"));
  CHECK_THROWS_WITH(m.hidden(t, ids(14, 1), 1, ids(14, 1)), Contains("a text has 13 tokens"));

  nn::kv_cache<double> cache(m.options(), 2, 3);
  CHECK_THROWS_WITH(m.prefill(t, ids(8, 1), ids{1, 1}, cache), Contains("4 tokens, but the cache has room for 3"));
  CHECK_THROWS_WITH(m.prefill(t, ids{1, 2}, ids{1, 2}, cache), Contains("lengths[1] = 2 is outside [1, 1]"));
  CHECK_THROWS_WITH(m.prefill(t, ids{1, 2}, ids{1}, cache), Contains("lengths has 1 elements"));
  CHECK(cache.lengths()[0] == 0);
  m.prefill(t, ids{1, 2, 3, 4}, ids{2, 2}, cache);
  CHECK_THROWS_WITH(m.prefill(t, ids{1, 2}, ids{1, 1}, cache),
                    Contains("sequence 0 of the cache holds 2 tokens already"));
  CHECK_THROWS_WITH(m.next(t, ids{1}, cache), Contains("ids has 1 elements"));
  m.next(t, ids{1, 2}, cache);
  CHECK_THROWS_WITH(m.next(t, ids{1, 2}, cache), Contains("sequence 0 fills the cache of 3 tokens"));
  CHECK_THROWS_WITH(cache.truncate(ids{1, 4}), Contains("lengths[1] = 4 is outside [0, 3]"));
  nn::kv_cache<double> other({.vocabulary = 13, .width = 16, .heads = 4, .blocks = 2}, 2, 3);
  CHECK_THROWS_WITH(m.next(t, ids{1, 2}, other), Contains("the cache has 4 heads"));
}

TEST_CASE("tokens are chosen as transformers' logits processors leave them", "[nn]") {
  const auto& logits = fixture("choice.logits", "language_fixtures.txt");
  const auto& before = fixture("choice.text", "language_fixtures.txt");
  const ids text(before.begin(), before.end());
  const std::pair<const char*, nn::choice_options> cases[] = {
      {"plain", {}},
      {"temperature", {.temperature = 0.7}},
      {"top_k", {.top_k = 5}},
      {"top_p", {.top_p = 0.8}},
      {"penalty", {.repetition_penalty = 1.3}},
      {"all", {.temperature = 1.5, .top_k = 12, .top_p = 0.6, .repetition_penalty = 1.3}}};
  for (const auto& [name, options] : cases) {
    INFO(name);
    const auto& want = fixture(std::string("choice.") + name, "language_fixtures.txt");
    constexpr int grid = 20000;
    std::vector<int> counts(want.size());
    for (int i = 0; i < grid; ++i) {
      const auto c = choose(logits, text, options, (i + 0.5) / grid);
      REQUIRE(std::abs(c.log_prob - want[static_cast<std::size_t>(c.id)]) < 1e-12);
      ++counts[static_cast<std::size_t>(c.id)];
    }
    for (std::size_t i = 0; i < want.size(); ++i) CHECK(std::abs(counts[i] - grid * std::exp(want[i])) <= 1);
  }
}

TEST_CASE("top-p keeps the token that crosses p, and no more", "[nn]") {
  const std::vector<double> z = logs({0.2, 0.5, 0.3});
  CHECK(drawn(z, {.top_p = 0.4}).size() == 1);
  CHECK(drawn(z, {.top_p = 0.55}).size() == 2);
  CHECK(drawn(z, {.top_p = 0.55})[1] == Approx(0.625).margin(2e-3));
  CHECK(drawn(z, {.top_p = 0.85}).size() == 3);
  CHECK(drawn(z, {.top_p = 1}).size() == 3);
  CHECK(drawn(z, {.top_p = 1e-9}).size() == 1);
}

TEST_CASE("temperature goes to the largest logit, and to equal shares", "[nn]") {
  const std::vector<double> z{1, 3, -2, 3, 2.9};
  CHECK(choose(z, {}, {.temperature = 0}, 0.99).id == 1);  // the lower of two
  CHECK(choose(z, {}, {.temperature = 0}, 0.99).log_prob == 0);
  for (const double t : {1e-3, 1e-30, 1e-300}) {
    const auto shares = drawn(z, {.temperature = t});
    CHECK(shares.size() == 2);
    CHECK(shares.at(1) == Approx(0.5));
  }
  for (const auto& [id, share] : drawn(z, {.temperature = 1e9})) CHECK(share == Approx(0.2));
  CHECK(choose({2, 2.5}, {}, {.temperature = 0, .top_k = 1, .top_p = 0.1}, 0).id == 1);
  CHECK(choose({2, 2.5}, ids{1, 1}, {.temperature = 0, .repetition_penalty = 2}, 0).id == 0);
  CHECK(choose({-1, -1.5}, ids{0}, {.temperature = 0, .repetition_penalty = 2}, 0).id == 1);  // away from 0, not to it
}

TEST_CASE("what cannot be drawn is not, at either end", "[nn]") {
  const std::vector<double> z{-infinity, 0, -infinity, 0, -infinity};
  CHECK(choose(z, {}, {}, 0).id == 1);
  CHECK(choose(z, {}, {}, std::nextafter(1.0, 0.0)).id == 3);
  CHECK(drawn(z, {.top_k = 4}).size() == 2);
  CHECK(choose({0, 0, 0}, {}, {.top_k = 2}, std::nextafter(1.0, 0.0)).id == 1);  // of equal ones the lower ids
  CHECK(choose({1e4, -1e4}, {}, {}, 0.999).id == 0);
  CHECK(choose({5}, {}, {.top_k = 3, .top_p = 0.5}, 0.7).log_prob == 0);
}

TEST_CASE("choosing refuses what it cannot use", "[nn]") {
  const std::vector<double> z{1, 2};
  CHECK_THROWS_WITH(choose(z, {}, {.temperature = -1}, 0), Contains("temperature = -1"));
  CHECK_THROWS_WITH(choose(z, {}, {.top_k = -1}, 0), Contains("top_k = -1"));
  CHECK_THROWS_WITH(choose(z, {}, {.top_p = 0}, 0), Contains("top_p = 0 is outside (0, 1]"));
  CHECK_THROWS_WITH(choose(z, {}, {.top_p = 1.1}, 0), Contains("top_p = 1.1"));
  CHECK_THROWS_WITH(choose(z, {}, {.repetition_penalty = 0}, 0), Contains("repetition_penalty = 0"));
  CHECK_THROWS_WITH(choose(z, {}, {}, 1), Contains("uniform = 1 is outside [0, 1)"));
  CHECK_THROWS_WITH(choose(z, ids{2}, {}, 0), Contains("id 2 of the text is outside the vocabulary of 2"));
  CHECK_THROWS_WITH(choose({1, std::nan("")}, {}, {}, 0), Contains("logits[1] = nan"));
  CHECK_THROWS_WITH(choose({infinity, 1}, {}, {}, 0), Contains("logits[0] = inf"));
  CHECK_THROWS_WITH(choose({-infinity, -infinity}, {}, {}, 0), Contains("none of the 2 logits is finite"));
  CHECK_THROWS_WITH(choose({}, {}, {}, 0), Contains("none of the 0 logits"));
}

TEST_CASE("continuations are drawn from the model's own probabilities", "[nn]") {
  const model m(small);
  const std::vector<ids> prompts{{1, 2, 3}, {4}, {5, 6}};
  for (const double temperature : {1.0, 0.7}) {
    nn::generation_options o{.most = 8, .choice = {.temperature = temperature}, .seed = 3};
    const auto all = nn::generate<double>({}, m, prompts, o);
    REQUIRE(all.size() == 3);
    for (std::size_t i = 0; i < 3; ++i) {
      ids text = prompts[i];
      REQUIRE(all[i].ids.size() == 8);
      for (std::size_t k = 0; k < 8; ++k) {
        const auto p = log_probs(m, text, temperature);
        CHECK(all[i].log_probs[k] == Approx(p[static_cast<std::size_t>(all[i].ids[k])]).margin(1e-12));
        text.push_back(all[i].ids[k]);
      }
    }
    for (const int threads : {1, 2, 3, 8}) {
      const auto again = nn::generate<double>(mlkit::cpu{.threads = threads}, m, prompts, o);
      for (std::size_t i = 0; i < 3; ++i) {
        CHECK(again[i].ids == all[i].ids);
        CHECK(again[i].log_probs == all[i].log_probs);
      }
    }
    o.seed = 4;
    CHECK(nn::generate<double>({}, m, prompts, o)[0].ids != all[0].ids);
  }
}

TEST_CASE("greedy continuations follow the largest logit and stop at the end", "[nn]") {
  const model m(small);
  const std::vector<ids> prompts{{1, 2, 3}, {4}};
  const auto all = nn::generate<double>({}, m, prompts, {.most = 10, .choice = {.temperature = 0}});
  for (std::size_t i = 0; i < 2; ++i) {
    ids text = prompts[i];
    for (const std::int32_t id : all[i].ids) {
      const auto p = log_probs(m, text, 1);
      CHECK(id == std::max_element(p.begin(), p.end()) - p.begin());
      text.push_back(id);
    }
  }
  const std::int32_t end = all[0].ids[2];
  const auto stopped = nn::generate<double>({}, m, prompts, {.most = 10, .end = end, .choice = {.temperature = 0}});
  for (std::size_t i = 0; i < 2; ++i) {
    const ids& whole = all[i].ids;
    const auto until = std::find(whole.begin(), whole.end(), end);
    CHECK(stopped[i].ids == ids(whole.begin(), until == whole.end() ? until : until + 1));
  }
  const auto penalised =
      nn::generate<double>({}, m, prompts, {.most = 10, .choice = {.temperature = 0, .repetition_penalty = 1e9}});
  ids text = prompts[0];  // at such a penalty nothing comes twice while logits of both signs are left
  text.insert(text.end(), penalised[0].ids.begin(), penalised[0].ids.begin() + 3);
  std::sort(text.begin(), text.end());
  CHECK(std::adjacent_find(text.begin(), text.end()) == text.end());
}

TEST_CASE("generation refuses what it cannot continue", "[nn]") {
  const model m(small);
  const auto run = [&](const std::vector<ids>& prompts, const nn::generation_options& o) {
    return nn::generate<double>({}, m, prompts, o);
  };
  CHECK(run({}, {}).empty());
  CHECK(run({{1}}, {.most = 0})[0].ids.empty());
  CHECK_THROWS_WITH(run({{1}, {}}, {.most = 1}), Contains("prompt 1 is empty"));
  CHECK_THROWS_WITH(run({{1, 2}}, {.most = 24}), Contains("2 tokens and 24 more exceed the context of 24"));
  CHECK_THROWS_WITH(run({{17}}, {.most = 1}), Contains("id 17"));
  CHECK_THROWS_WITH(run({{1}}, {.most = -1}), Contains("most = -1"));
  CHECK_THROWS_WITH(run({{1}}, {.most = 1, .choice = {.top_p = 2}}), Contains("top_p = 2"));
}

TEST_CASE("training learns what follows prompts, and nothing of the prompts", "[nn]") {
  // Texts a a+1 a+2 ... (mod 16) behind a first token that says nothing.
  std::vector<nn::training_text> texts;
  for (std::int32_t a = 0; a < 16; ++a) {
    ids text{16};
    for (std::int32_t i = 0; i < 8; ++i) text.push_back((a + i) % 16);
    texts.push_back({.ids = text, .prompt = 2});
  }
  const auto run = [&](int threads) {
    auto m = std::make_unique<model>(small);
    const auto over = nn::trainable(m->store());
    nn::adamw<double> optimizer(over, {.decay = 0});
    index_t called = 0;
    const auto losses = nn::train_language_model<double>(mlkit::cpu{.threads = threads}, *m, over, optimizer, texts,
                                                         {.steps = 60, .tokens = 64, .rate = 1e-2, .seed = 1},
                                                         [&](index_t step, double) { called += step == called; });
    CHECK(called == 60);
    CHECK(losses.front() > 2.5);
    return std::make_pair(std::move(m), losses);
  };
  const auto [m, losses] = run(1);
  CHECK(nn::language_loss<double>({}, *m, texts) < 0.1);
  CHECK(run(2).second == losses);
  CHECK(run(3).second == losses);
  const auto next = nn::generate<double>({}, *m, std::vector<ids>{{16, 14}}, {.most = 4, .choice = {.temperature = 0}});
  CHECK(next[0].ids == ids{15, 0, 1, 2});
  // The loss over several packs is the mean over tokens.
  CHECK(nn::language_loss<double>({}, *m, texts, 9) == Approx(nn::language_loss<double>({}, *m, texts)).epsilon(1e-4));
}

TEST_CASE("gradients are clipped to a common length", "[nn]") {
  nn::parameters<double> store;
  auto& a = store.add("a", {3}, nn::zeros{});
  auto& b = store.add("b", {1}, nn::zeros{});
  auto& c = store.add("c", {1}, nn::zeros{});
  const auto give = [](nn::parameter<double>& p, std::vector<double> g) {
    p.grad = mlkit::vector<double>({p.size()});
    std::copy(g.begin(), g.end(), p.grad.begin());
    p.has_grad = true;
  };
  give(a, {3, 0, 0}), give(b, {4});
  const std::vector<nn::parameter<double>*> over{&a, &b, &c};
  CHECK(nn::clip_gradients<double>({}, over, 6) == 5);
  CHECK(a.grad(0) == 3);
  CHECK(nn::clip_gradients<double>({}, over, 1) == 5);
  CHECK(a.grad(0) == Approx(0.6));
  CHECK(b.grad(0) == Approx(0.8));
  CHECK_THROWS_WITH(nn::clip_gradients<double>({}, over, 0), Contains("most = 0"));
  give(b, {std::numeric_limits<double>::infinity()});
  CHECK_THROWS_WITH(nn::clip_gradients<double>({}, over, 1), Contains("a gradient is not finite"));
}

TEST_CASE("training refuses what it cannot learn", "[nn]") {
  model m(small);
  const auto over = nn::trainable(m.store());
  nn::adamw<double> optimizer(over);
  const auto run = [&](std::vector<nn::training_text> texts) {
    nn::train_language_model<double>({}, m, over, optimizer, texts, {.steps = 1, .tokens = 16}, [](index_t, double) {});
  };
  CHECK_THROWS_WITH(run({}), Contains("there is no text"));
  CHECK_THROWS_WITH(run({{.ids = ids(17, 1)}}), Contains("text 0 has 17 tokens, but a step has 16 and the context 24"));
  CHECK_THROWS_WITH(run({{.ids = {1, 2}}, {.ids = {1}}}), Contains("text 1 has 1 tokens, of which 1 are its prompt"));
  CHECK_THROWS_WITH(nn::language_loss<double>({}, m, std::vector<nn::training_text>{{.ids = {1}}}),
                    Contains("nothing to predict"));
}
