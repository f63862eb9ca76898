// Prompt-to-Prompt, against loops that store the maps and edit them one by one, as the paper's code does.
#include "naive_maps.hpp"

namespace attention = mlkit::attention;
using namespace attention_reference;
using attention::align_refined, attention::align_replaced, attention::align_same;
using mlkit::cpu;
using mlkit::tensor;
using mlkit::tensor_view;
using ids = std::vector<std::int32_t>;

namespace {

// Where each target token comes from: its one source token, -1 for none, -2 for a mixture.
ids sources(const attention::alignment& a) {
  ids from;
  for (index_t t = 0; t < a.length; ++t) {
    index_t found = -1;
    for (index_t s = 0; s < a.length; ++s)
      if (a.weight(s, t) != 0) found = found == -1 && a.weight(s, t) == 1 ? s : -2;
    from.push_back(static_cast<std::int32_t>(found));
  }
  return from;
}

// Fractions of steps in which each edit, and each of its tokens, is edited: [edit][token].
using schedule = std::vector<std::vector<attention::step_range>>;

// The paper's code: base maps mapped, mixed by alphas, reweighted, mixed by the schedule's alphas; Sum and Stored as
// for naive_maps. Tokens beyond `lengths` get nothing.
template <class Sum, class Stored, class T>
struct naive_edit {
  stored_maps maps;
  std::vector<double> out;  // [batch, heads, queries, d_v]

  naive_edit(const problem<T>& p, const meaning& m, const std::vector<attention::prompt_edit>& edits,
             const schedule& when, index_t steps, index_t step, const std::vector<int>& lengths = {})
      : maps(naive_maps<Sum, Stored>(p.q, p.k, m)) {
    const auto stored = [](auto x) { return static_cast<double>(static_cast<Stored>(static_cast<Sum>(x))); };
    const stored_maps before = maps;
    stored_maps base = before;
    for (index_t b = 1; b < p.batch; ++b) {
      const auto e = static_cast<std::size_t>(b - 1);
      for (index_t h = 0; h < p.heads; ++h)
        for (index_t i = 0; i < p.queries; ++i)
          for (index_t t = 0; t < p.keys; ++t) {
            const auto at = static_cast<std::size_t>(t);
            double mapped = 0;
            for (index_t s = 0; s < p.keys; ++s)
              mapped += base(0, h, i, s) * static_cast<double>(edits[e].words.weight(s, t));
            const double own = maps(b, h, i, t), alpha = static_cast<double>(edits[e].words.taken[at]);
            double replaced = stored(stored(mapped) * alpha + own * (1 - alpha));
            if (!edits[e].equaliser.empty()) replaced = stored(replaced * static_cast<double>(edits[e].equaliser[at]));
            const auto n = static_cast<double>(steps + 1);
            const bool now =
                step >= static_cast<int>(when[e][at].begin * n) && step < static_cast<int>(when[e][at].end * n);
            maps(b, h, i, t) = now ? replaced : own;
            if (!lengths.empty() && t >= lengths[static_cast<std::size_t>(b)]) maps(b, h, i, t) = 0;
          }
    }
    finish(p, stored);
  }

  // Self-attention that is the source's.
  naive_edit(const problem<T>& p, const meaning& m) : maps(naive_maps<Sum, Stored>(p.q, p.k, m)) {
    for (index_t b = 1; b < p.batch; ++b)
      for (index_t h = 0; h < p.heads; ++h)
        for (index_t i = 0; i < p.queries; ++i)
          for (index_t j = 0; j < p.keys; ++j) maps(b, h, i, j) = maps(0, h, i, j);
    finish(p, [](auto x) { return static_cast<double>(static_cast<Stored>(static_cast<Sum>(x))); });
  }

  template <class F>
  void finish(const problem<T>& p, const F& stored) {
    for (index_t b = 0; b < p.batch; ++b)
      for (index_t h = 0; h < p.heads; ++h)
        for (index_t i = 0; i < p.queries; ++i)
          for (index_t c = 0; c < p.d_v; ++c) {
            double sum = 0;
            for (index_t j = 0; j < p.keys; ++j)
              if (maps(b, h, i, j) != 0)
                sum += maps(b, h, i, j) * static_cast<double>(p.v(b, h / (p.heads / p.kv_heads), j, c));
            out.push_back(stored(sum));
          }
  }
};

template <class F>
std::string refusal(const F& f) {
  try {
    f();
  } catch (const mlkit::error& e) {
    return e.what();
  }
  return "no error";
}

double difference(const std::vector<double>& want, const auto& tensor_or_view) {
  const auto have = mlkit::as_view(tensor_or_view);
  double most = 0;
  REQUIRE(static_cast<index_t>(want.size()) == have.size());
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double e = std::fabs(want[i] - static_cast<double>(have.data[i]));
    most = e <= most ? most : std::isnan(e) ? inf : e;
  }
  return most;
}

schedule everywhere(const std::vector<attention::prompt_edit>& edits) {
  schedule when;
  for (const auto& e : edits) {
    when.emplace_back(static_cast<std::size_t>(e.words.length), e.cross);
    for (const auto& t : e.of_tokens)
      for (const std::int32_t token : t.tokens) when.back()[static_cast<std::size_t>(token)] = t.steps;
  }
  return when;
}

// Three edits of one prompt of nine tokens, padded to `length`: two words that others replace, one that grows, some
// that are new, and others that count more and less.
std::vector<attention::prompt_edit> three_edits(index_t length) {
  const ids source{1, 5, 6, 7, 8, 9, 5, 10, 2}, replaced{1, 5, 11, 12, 8, 13, 5, 10, 2},
      refined{1, 5, 14, 6, 7, 8, 9, 15, 5, 10, 2};
  const ids words{-1, 0, 1, 2, 2, 3, 4, 5, -1}, others{-1, 0, 1, 1, 2, 3, 4, 5, -1};
  std::vector<float> equaliser(static_cast<std::size_t>(length), 1.0f);
  equaliser[2] = 4, equaliser[3] = -2, equaliser[7] = 0.5f, equaliser[8] = 0;
  std::vector<attention::prompt_edit> edits;
  edits.push_back({.words = align_replaced({source, words}, {replaced, others}, length), .cross = {0, 0.75}});
  edits.push_back({.words = align_refined(source, refined, length),
                   .equaliser = equaliser,
                   .cross = {0.25, 0.75},
                   .of_tokens = {{{3, 4}, {0, 0.4}}, {{4}, {0, 1}}}});
  edits.push_back({.words = align_same(length), .equaliser = equaliser, .cross = {0, 1}});
  // Taken in part.
  edits[0].words.taken[4] = 0.25f;
  return edits;
}

}  // namespace

TEST_CASE("refined prompts align as the paper's code aligns them", "[attention][edit]") {
  const auto align = [](const ids& x, const ids& y) {
    const attention::alignment a = align_refined(x, y, 10);
    ids from = sources(a);
    for (std::size_t t = 0; t < 10; ++t) CHECK(a.taken[t] == (from[t] == -1 ? 0.0f : 1.0f));
    // Padding is its position's.
    for (std::size_t t = y.size(); t < 10; ++t) CHECK(from[t] == static_cast<int>(t));
    from.resize(y.size());
    return from;
  };
  CHECK(align({1, 5, 6, 7, 5, 8, 2}, {1, 5, 6, 7, 5, 8, 9, 10, 2}) == ids{0, 1, 2, 3, 4, 5, -1, -1, 6});
  CHECK(align({1, 5, 8, 2}, {1, 5, 9, 10, 8, 2}) == ids{0, 1, -1, -1, 2, 3});
  CHECK(align({1, 5, 9, 8, 11, 5, 12, 2}, {1, 5, 8, 2}) == ids{0, 1, 3, 7});
  CHECK(align({1, 5, 5, 6, 2}, {1, 5, 6, 5, 2}) == ids{0, 1, 3, -1, 4});
  CHECK(align({1, 2}, {1, 5, 2}) == ids{0, -1, 1});
  CHECK(align({1, 5, 6, 7, 2}, {1, 7, 6, 5, 2}) == ids{0, 3, -1, -1, 4});
  CHECK(align({}, {3, 4}) == ids{-1, -1});
}

TEST_CASE("replaced words align word by word", "[attention][edit]") {
  const ids source{1, 5, 6, 7, 8, 9, 2}, target{1, 5, 11, 12, 7, 13, 2};
  // The second word is of one token and becomes two, the last of two and becomes one.
  const attention::alignment a =
      align_replaced({source, ids{-1, 0, 1, 2, 3, 3, -1}}, {target, ids{-1, 0, 1, 1, 2, 3, -1}}, 8);
  std::vector<float> want(64);
  for (const auto& [s, t, weight] : std::vector<std::tuple<int, int, float>>{{0, 0, 1.0f},
                                                                             {1, 1, 1.0f},
                                                                             {2, 2, 0.5f},
                                                                             {2, 3, 0.5f},
                                                                             {3, 4, 1.0f},
                                                                             {4, 5, 1.0f},
                                                                             {5, 5, 1.0f},
                                                                             {6, 6, 1.0f},
                                                                             {7, 7, 1.0f}})
    want[static_cast<std::size_t>(s * 8 + t)] = weight;
  CHECK(a.mapping == want);
  CHECK(a.taken == std::vector<float>(8, 1.0f));
  // Tokens that are words, and words of as many tokens.
  CHECK(sources(align_replaced({ids{1, 5, 6, 2}}, {ids{1, 5, 7, 2}}, 6)) == ids{0, 1, 2, 3, 4, 5});
  CHECK(sources(align_replaced({ids{1, 5, 6, 2}, ids{-1, 0, 0, -1}}, {ids{1, 7, 8, 2}, ids{-1, 0, 0, -1}}, 4)) ==
        ids{0, 1, 2, 3});
  // What follows a word that grew, or shrank, keeps its order.
  CHECK(sources(align_replaced({ids{1, 5, 6, 2}, ids{-1, 0, 1, -1}}, {ids{1, 5, 6, 7, 8, 2}, ids{-1, 0, 1, 1, 1, -1}},
                               8)) == ids{0, 1, -2, -2, -2, 3, 4, 5});
  CHECK(sources(align_replaced({ids{1, 5, 6, 7, 2}, ids{-1, 0, 1, 1, -1}}, {ids{1, 5, 8, 2}, ids{-1, 0, 1, -1}}, 6)) ==
        ids{0, 1, -2, 4, 5, -1});
  CHECK(sources(align_same(3)) == ids{0, 1, 2});
}

TEST_CASE("edited cross-attention is what stored maps give, in every step", "[attention][edit]") {
  problem<double> p(4, 4, 2, 70, 13, 5, 7);
  const auto edits = three_edits(13);
  const attention::edit_plan plan({.steps = 8}, edits);
  const meaning m = scaled(1 / std::sqrt(5.0));
  std::vector<std::vector<double>> seen;
  for (index_t step = 0; step < 8; ++step) {
    INFO("step " << step);
    std::fill(p.out.begin(), p.out.end(), std::nan(""));
    attention::edited_cross(cpu{}, p.q, p.k, p.v, attention::scores<>{}, plan, step, p.out);
    const naive_edit<double, double, double> want(p, m, edits, everywhere(edits), 8, step);
    CHECK(difference(want.out, p.out) < tight);
    if (seen.empty() || seen.back() != want.out) seen.push_back(want.out);
  }
  CHECK(seen.size() == 4);  // the schedule has as many stretches
}

TEST_CASE("edits behind masks, over more keys than a block, and where an edit is nothing", "[attention][edit]") {
  problem<double> p(4, 2, 2, 130, 300, 6, 3);
  auto edits = three_edits(300);
  std::fill(edits[2].equaliser.begin(), edits[2].equaliser.end(), 0.0f);
  const std::vector<int> lengths{9, 9, 11, 300};
  for (index_t b = 0; b < 4; ++b)
    for (index_t h = 0; h < 2; ++h)
      for (index_t j = lengths[static_cast<std::size_t>(b)]; j < 300; ++j) {
        std::fill_n(&p.k(b, h, j, 0), 6, std::nan(""));
        std::fill_n(&p.v(b, h, j, 0), 3, std::nan(""));
      }
  const meaning m =
      masked(0.7, [&](index_t b, index_t, index_t, index_t j) { return j < lengths[static_cast<std::size_t>(b)]; });
  const attention::edit_plan plan({.steps = 4}, edits);
  for (const index_t step : {0, 1, 3}) {
    attention::edited_cross(cpu{}, p.q, p.k, p.v,
                            attention::scores{attention::scale{0.7}, attention::key_lengths{lengths}}, plan, step,
                            p.out);
    const naive_edit<double, double, double> want(p, m, edits, everywhere(edits), 4, step, lengths);
    CHECK(difference(want.out, p.out) < tight);
  }
}

TEST_CASE("sequences before the source are attended to as usual", "[attention][edit]") {
  problem<double> all(6, 4, 2, 70, 13, 5, 7);
  const auto rest = [](auto& t) {
    return tensor_view<double, 4>(&t(2, 0, 0, 0), {4, t.extent(1), t.extent(2), t.extent(3)});
  };
  const auto edits = three_edits(13);
  const attention::edit_plan plan({.steps = 8, .unedited = 2}, edits), without({.steps = 8}, edits);
  const attention::scores<> pipeline;
  attention::local_blend blend({.height = 7, .width = 10}, 13, {{1}, {2}, {3}, {4}}), other = blend;
  tensor<double, 4> want(all.out.extents());
  const auto same = [&] {
    return std::memcmp(want.data(), all.out.data(), static_cast<std::size_t>(want.size()) * 8) == 0;
  };
  attention::forward(cpu{}, all.q, all.k, all.v, pipeline, want);
  attention::edited_cross(cpu{}, rest(all.q), rest(all.k), rest(all.v), pipeline, without, 3, rest(want), other);
  attention::edited_cross(cpu{}, all.q, all.k, all.v, pipeline, plan, 3, all.out, blend);
  CHECK(same());
  CHECK(std::memcmp(blend.sums().data, other.sums().data, 4 * 70 * 8) == 0);
  CHECK(refusal([&] {
          attention::edited_cross(cpu{}, rest(all.q), rest(all.k), rest(all.v), pipeline, plan, 3, rest(want));
        }) == "mlkit::shape_error: attention::edited_cross: q has 4 batches, but plan has 6");
  attention::edited_self(cpu{}, rest(all.q), rest(all.k), rest(all.v), pipeline, without, 1, rest(want));
  attention::edited_self(cpu{}, all.q, all.k, all.v, pipeline, plan, 1, all.out);
  CHECK(same());
}

TEST_CASE("self-attention of the source, in its steps and up to so many queries", "[attention][edit]") {
  problem<double> p(3, 4, 2, 70, 70, 5, 7);
  const meaning m = scaled(1 / std::sqrt(5.0));
  const std::vector<attention::prompt_edit> two = [] {
    std::vector<attention::prompt_edit> e(2);
    for (auto& x : e) x.words = align_same(4);
    return e;
  }();
  const attention::edit_plan plan({.steps = 10, .self = {0.2, 0.5}, .self_queries = 70}, two);
  const naive_edit<double, double, double> replaced(p, m);
  const std::vector<double> plain = p.naive<double, double>(m).of[0];
  for (index_t step = 0; step < 10; ++step) {
    attention::edited_self(cpu{}, p.q, p.k, p.v, attention::scores<>{}, plan, step, p.out);
    CHECK(difference(step >= 2 && step < 5 ? replaced.out : plain, p.out) < tight);
  }
  const attention::edit_plan small({.steps = 10, .self = {0.2, 0.5}, .self_queries = 69}, two);
  attention::edited_self(cpu{}, p.q, p.k, p.v, attention::scores<>{}, small, 3, p.out);
  CHECK(difference(plain, p.out) < tight);
}

TEST_CASE("local blend: attention to words, after editing, makes the region", "[attention][edit]") {
  const index_t height = 7, width = 9;
  problem<double> p(4, 4, 2, height * width, 13, 5, 7), other(4, 4, 2, 30, 13, 5, 7);
  const auto edits = three_edits(13);
  const attention::edit_plan plan({.steps = 8}, edits);
  const meaning m = scaled(2);
  const attention::scores pipeline{attention::scale{2}};
  const std::vector<ids> words{{3, 4}, {2}, {7, 2, 3}, {}};
  attention::local_blend blend({.height = height, .width = width, .threshold = 0.6, .pool = 1, .start = 2}, 13, words);
  // Two layers in two steps, one of another resolution.
  std::vector<double> sums(static_cast<std::size_t>(4 * height * width));
  for (const index_t step : {1, 6}) {
    tensor<double, 4> out(p.out.extents());
    attention::edited_cross(cpu{}, p.q, p.k, p.v, pipeline, plan, step, out, blend);
    attention::edited_cross(cpu{}, other.q, other.k, other.v, pipeline, plan, step, other.out, blend);
    naive_edit<double, double, double> want(p, m, edits, everywhere(edits), 8, step);
    CHECK(difference(want.out, out) < tight);
    for (index_t b = 0; b < 4; ++b)
      for (index_t i = 0; i < height * width; ++i)
        for (const std::int32_t t : words[static_cast<std::size_t>(b)])
          sums[static_cast<std::size_t>(b * height * width + i)] += want.maps.mean(b, i, t);
  }
  CHECK(difference(sums, blend.sums()) < tight);

  // As torch does: max_pool2d of three by three, interpolate by the nearest, over the largest.
  const index_t rows = 14, columns = 27;
  const auto inside = [&](index_t b, index_t y, index_t x) {
    const auto at = [&](index_t r, index_t c) { return sums[static_cast<std::size_t>((b * height + r) * width + c)]; };
    double top = 0, here = 0;
    for (index_t r = 0; r < height; ++r)
      for (index_t c = 0; c < width; ++c) top = std::max(top, at(r, c));
    for (index_t r = y / 2 - 1; r <= y / 2 + 1; ++r)
      for (index_t c = x / 3 - 1; c <= x / 3 + 1; ++c)
        if (r >= 0 && r < height && c >= 0 && c < width) here = std::max(here, at(r, c));
    return here / top > 0.6;
  };
  tensor<float, 4> latents({4, 3, rows, columns});
  fill<float>(latents, 9);
  const tensor<float, 4> before = latents.clone();
  blend.apply(cpu{}, 1, latents);
  CHECK(std::memcmp(latents.data(), before.data(), static_cast<std::size_t>(latents.size()) * sizeof(float)) == 0);
  blend.apply(cpu{.threads = 3}, 2, latents);
  index_t wrong = 0, kept = 0;
  for (index_t b = 0; b < 4; ++b)
    for (index_t c = 0; c < 3; ++c)
      for (index_t y = 0; y < rows; ++y)
        for (index_t x = 0; x < columns; ++x) {
          const bool keep = b == 0 || inside(0, y, x) || (b < 3 && inside(b, y, x));
          wrong += latents(b, c, y, x) != before(keep ? b : 0, c, y, x);
          kept += keep;
        }
  CHECK(wrong == 0);
  CHECK(kept > latents.size() / 4 + 100);
  CHECK(kept < latents.size() - 100);

  blend.clear();
  CHECK(*std::max_element(blend.sums().data, blend.sums().data + blend.sums().size()) == 0);
  blend.apply(cpu{}, 5, latents);
  for (index_t i = 0; i < latents.size() / 4; ++i) REQUIRE(latents.data()[i + latents.size() / 4] == latents.data()[i]);
}

TEMPLATE_TEST_CASE("the error of an edit is at most twice that of stored maps in the same dtype", "[attention][edit]",
                   float, mlkit::bf16, mlkit::f16) {
  using T = TestType;
  problem<T> p(4, 4, 2, 150, 77, 40, 48);
  const double scale = 1 / std::sqrt(40.0);
  const auto edits = three_edits(77);
  const attention::edit_plan plan({.steps = 8}, edits);
  for (const index_t step : {0, 3, 7}) {
    const naive_edit<double, double, T> want(p, scaled(scale), edits, everywhere(edits), 8, step);
    const naive_edit<float, T, T> loops(p, scaled(scale), edits, everywhere(edits), 8, step);
    attention::edited_cross(cpu{}, p.q, p.k, p.v, attention::scores{attention::scale{scale}}, plan, step, p.out);
    double most = 0, size = 0;
    for (std::size_t i = 0; i < want.out.size(); ++i) {
      most = std::max(most, std::fabs(want.out[i] - loops.out[i]));
      size = std::max(size, std::fabs(want.out[i]));
    }
    CHECK(difference(want.out, p.out) <= 2 * most + rounding<T> * size);
  }
}

TEST_CASE("edits have the same bits for any number of threads, and in views of any strides", "[attention][edit]") {
  problem<float> p(4, 4, 2, 700, 77, 40, 40);
  const attention::edit_plan plan({.steps = 8}, three_edits(77));
  const attention::scores pipeline{attention::scale{0.2}};
  attention::local_blend blend({.height = 35, .width = 20}, 77, {{1}, {2}, {3}, {4}});
  attention::edited_cross(cpu{.threads = 1}, p.q, p.k, p.v, pipeline, plan, 3, p.out, blend);
  for (const int threads : {2, 3, 8}) {
    tensor<float, 4> out(p.out.extents());
    attention::local_blend other({.height = 35, .width = 20}, 77, {{1}, {2}, {3}, {4}});
    attention::edited_cross(cpu{.threads = threads}, p.q, p.k, p.v, pipeline, plan, 3, out, other);
    CHECK(std::memcmp(out.data(), p.out.data(), static_cast<std::size_t>(out.size()) * sizeof(float)) == 0);
    CHECK(std::memcmp(blend.sums().data, other.sums().data, static_cast<std::size_t>(blend.sums().size()) * 8) == 0);
  }
  // Heads side by side, as projections write them.
  std::vector<float> memory(4 * 700 * 4 * 50, 12345.0f);
  const tensor_view<float, 4> beside(memory.data(), {4, 4, 700, 40}, {700 * 200, 50, 200, 1});
  attention::edited_cross(cpu{}, p.q, p.k, p.v, pipeline, plan, 3, beside);
  bool same = true;
  for (index_t b = 0; b < 4; ++b)
    for (index_t h = 0; h < 4; ++h)
      for (index_t i = 0; i < 700; ++i)
        for (index_t c = 0; c < 40; ++c) same = same && beside(b, h, i, c) == p.out(b, h, i, c);
  CHECK(same);
  CHECK(std::count(memory.begin(), memory.end(), 12345.0f) == 4 * 700 * 4 * 10);
}

TEST_CASE("an edit's scratch memory does not grow with queries times keys", "[attention][edit]") {
  const auto peak = [](index_t queries) {
    tensor<float, 4> q({4, 2, queries, 8}), k({4, 2, 300, 8}), v({4, 2, 300, 8}), out({4, 2, queries, 8});
    const attention::edit_plan plan({.steps = 8}, three_edits(300));
    mlkit::reset_workspace_peak();
    attention::edited_cross(cpu{.threads = 1}, q, k, v, attention::scores{attention::scale{1}}, plan, 3, out);
    return mlkit::workspace_peak_bytes();
  };
  CHECK(peak(1024) == peak(8192));
}

TEST_CASE("edits of nothing", "[attention][edit]") {
  const auto call = [](index_t heads, index_t queries, index_t keys, index_t d_v) {
    problem<float> p(2, heads, heads, queries, keys, 4, d_v);
    std::vector<attention::prompt_edit> edits(1);
    edits[0].words = align_same(keys);
    const attention::edit_plan plan({.steps = 2}, edits);
    std::fill(p.out.begin(), p.out.end(), 12345.0f);
    attention::edited_cross(cpu{}, p.q, p.k, p.v, attention::scores{attention::scale{1}}, plan, 0, p.out);
    attention::edited_self(cpu{}, p.q, p.k, p.v, attention::scores{attention::scale{1}}, plan, 0, p.out);
    return std::all_of(p.out.begin(), p.out.end(), [](float x) { return x == 0; });
  };
  CHECK(call(0, 3, 4, 2));
  CHECK(call(2, 0, 4, 2));
  CHECK(call(2, 3, 0, 2));
  CHECK(call(2, 3, 4, 0));
}

TEST_CASE("alignments that are none are refused", "[attention][edit][bad input]") {
  const std::string replaced = "_error: attention::align_replaced: ";
  const auto replace = [](const ids& x, const ids& xw, const ids& y, const ids& yw, index_t length) {
    return refusal([&] { (void)align_replaced({x, xw}, {y, yw}, length); });
  };
  CHECK(replace({1, 2}, {}, {1, 2, 3}, {}, 5) == "mlkit::value" + replaced + "source has 2 words, but target has 3");
  CHECK(replace({1, 2}, {}, {1, 2, 3}, {}, 2) == "mlkit::shape" + replaced + "target has 3 tokens, but length is 2");
  CHECK(replace({1, 2}, {0}, {1, 2}, {}, 2) ==
        "mlkit::shape" + replaced + "source.words has 1 elements, but source.ids has 2");
  CHECK(replace({1, 2}, {0, 1}, {1, 2}, {0, 2}, 2) ==
        "mlkit::value" + replaced + "target.words[1] = 2 neither goes on with the word before nor is 1, the next");
  CHECK(replace({1, 2, 3}, {0, -1, 0}, {1, 2}, {0, 1}, 3) ==
        "mlkit::value" + replaced + "source.words[2] = 0 neither goes on with the word before nor is 1, the next");
  CHECK(replace({1}, {-2}, {1}, {0}, 3) ==
        "mlkit::value" + replaced + "source.words[0] = -2 neither goes on with the word before nor is 0, the next");
  CHECK(refusal([] {
          (void)align_refined(ids{1, 2}, ids{1}, 1);
        }) == "mlkit::shape_error: attention::align_refined: source has 2 tokens, but length is 1");
  CHECK(refusal([] { (void)align_refined(ids{}, ids{}, -1); }) ==
        "mlkit::value_error: attention::align_refined: length = -1 is negative");
  CHECK(refusal([] { (void)align_same(-1); }) == "mlkit::value_error: attention::align_same: length = -1 is negative");
}

TEST_CASE("plans that are none are refused", "[attention][edit][bad input]") {
  const auto plan = [](const attention::edit_options& o, const auto& change) {
    std::vector<attention::prompt_edit> edits(2);
    for (auto& e : edits) e.words = align_same(3);
    change(edits);
    return refusal([&] { const attention::edit_plan made(o, edits); });
  };
  const auto as_is = [](auto&) {};
  const std::string value = "mlkit::value_error: attention::edit_plan: ",
                    shape = "mlkit::shape_error: attention::edit_plan: ";
  CHECK(plan({}, as_is) == "no error");
  CHECK(plan({.steps = 0}, as_is) == value + "steps = 0 is outside [1, 2147483647]");
  CHECK(plan({.steps = index_t{1} << 31}, as_is) == value + "steps = 2147483648 is outside [1, 2147483647]");
  CHECK(plan({.unedited = -1}, as_is) == value + "unedited = -1 is outside [0, 2147483647]");
  CHECK(plan({.unedited = INT64_MAX}, as_is).find("outside [0, 2147483647]") != std::string::npos);
  CHECK(plan({.self_queries = -1}, as_is) == value + "self_queries = -1 is negative");
  CHECK(plan({.self = {0.5, 0.4}}, as_is) == value + "self = [0.5, 0.4) is no part of [0, 1]");
  CHECK(plan({.self = {0, NAN}}, as_is).rfind(value + "self = [0, ", 0) == 0);
  CHECK(plan({}, [](auto& e) { e.clear(); }) == value + "there is no edit");
  CHECK(plan({}, [](auto& e) { e[1].words = align_same(4); }) ==
        shape + "an alignment has 4 tokens, but the first has 3");
  CHECK(plan({}, [](auto& e) { e[1].words.mapping.pop_back(); }) == shape + "mapping has 8 elements, but must have 9");
  CHECK(plan({}, [](auto& e) { e[0].words.taken.clear(); }) == shape + "taken has 0 elements, but must have 3");
  CHECK(plan({}, [](auto& e) { e[0].words.taken[1] = 1.5f; }) == value + "taken = 1.5 is outside [0, 1]");
  CHECK(plan({}, [](auto& e) { e[0].words.mapping[1] = INFINITY; }) == value + "mapping has an element inf");
  CHECK(plan({}, [](auto& e) { e[0].equaliser = {1, 2}; }) == shape + "equaliser has 2 elements, but must have 3");
  CHECK(plan({}, [](auto& e) { e[0].equaliser = {1, 2, NAN}; }) == value + "equaliser has an element nan");
  CHECK(plan({}, [](auto& e) { e[0].cross = {-0.1, 1}; }) == value + "cross = [-0.1, 1) is no part of [0, 1]");
  CHECK(plan({}, [](auto& e) {
          e[1].of_tokens = {{{0}, {0, 1.1}}};
        }) == value + "of_tokens = [0, 1.1) is no part of [0, 1]");
  CHECK(plan({}, [](auto& e) {
          e[1].of_tokens = {{{0, 3}, {0, 1}}};
        }) == value + "of_tokens has token 3, which is outside [0, 3)");
}

TEST_CASE("edited attention that does not fit is refused, and nothing is written", "[attention][edit][bad input]") {
  problem<float> p(3, 2, 1, 12, 7, 4, 3);
  std::fill(p.out.begin(), p.out.end(), 12345.0f);
  std::vector<attention::prompt_edit> edits(2);
  for (auto& e : edits) e.words = align_same(7);
  const attention::edit_plan plan({.steps = 5}, edits);
  attention::local_blend blend({.height = 3, .width = 4}, 7, {{1}, {1}, {1}});
  const attention::scores pipeline{attention::scale{1}};
  const auto said = [&](const auto& call) {
    std::string text = refusal(call);
    CHECK(std::all_of(p.out.begin(), p.out.end(), [](float x) { return x == 12345.0f; }));
    for (const double x : std::vector<double>(blend.sums().data, blend.sums().data + blend.sums().size()))
      CHECK(x == 0);
    return text;
  };
  const auto cross = [&](const attention::edit_plan& with, index_t step, attention::local_blend& to) {
    return said([&] { attention::edited_cross(cpu{}, p.q, p.k, p.v, pipeline, with, step, p.out, to); });
  };
  const std::string shape = "mlkit::shape_error: attention::edited_cross: ",
                    value = "mlkit::value_error: attention::edited_cross: ";
  CHECK(cross(plan, 5, blend) == value + "step = 5 is outside [0, 5)");
  CHECK(cross(plan, -1, blend) == value + "step = -1 is outside [0, 5)");
  edits.pop_back();
  CHECK(cross(attention::edit_plan({}, edits), 0, blend) == shape + "q has 3 batches, but plan has 2");
  edits.push_back(edits[0]);
  for (auto& e : edits) e.words = align_same(8);
  CHECK(cross(attention::edit_plan({}, edits), 0, blend) == shape + "k has 7 keys, but plan has 8");
  attention::local_blend two({.height = 3, .width = 4}, 7, {{1}, {1}}),
      longer({.height = 3, .width = 4}, 8, {{1}, {1}, {1}});
  CHECK(cross(plan, 0, two) == shape + "blend has 2 prompts, but plan has 3");
  CHECK(cross(plan, 0, longer) == shape + "blend has 8 tokens, but plan has 7");
  CHECK(said([&] {
          attention::edited_cross(cpu{}, p.q, p.k, p.v, pipeline, plan, 0,
                                  tensor_view<float, 4>(p.out.data(), {3, 2, 12, 2}));
        }) == shape + "out has 2 columns, but v has 3");
  CHECK(said([&] { attention::edited_cross(cpu{}, p.q, p.out, p.v, pipeline, plan, 0, p.out); }).rfind(shape, 0) == 0);
  const std::string self = "_error: attention::edited_self: ";
  CHECK(said([&] { attention::edited_self(cpu{}, p.q, p.k, p.v, pipeline, plan, 7, p.out); }) ==
        "mlkit::value" + self + "step = 7 is outside [0, 5)");
  edits.pop_back();
  CHECK(said([&] {
          attention::edited_self(cpu{}, p.q, p.k, p.v, pipeline, attention::edit_plan({}, edits), 0, p.out);
        }) == "mlkit::shape" + self + "q has 3 batches, but plan has 2");

  const auto blends = [](const attention::blend_options& o, index_t length, const std::vector<ids>& tokens) {
    return refusal([&] { const attention::local_blend made(o, length, tokens); });
  };
  const std::string local = "mlkit::value_error: attention::local_blend: ";
  CHECK(blends({.height = 0}, 7, {{1}}) == local + "height = 0 is not positive");
  CHECK(blends({.width = -1}, 7, {{1}}) == local + "width = -1 is not positive");
  CHECK(blends({.threshold = 1.5}, 7, {{1}}) == local + "threshold = 1.5 is outside [0, 1]");
  CHECK(blends({.pool = -1}, 7, {{1}}) == local + "pool = -1 is negative");
  CHECK(blends({}, -7, {{}}) == local + "length = -7 is negative");
  CHECK(blends({}, 7, {}) == local + "there is no prompt");
  CHECK(blends({}, 7, {{1}, {7}}) == local + "tokens[1] has 7, which is outside [0, 7)");
  const index_t endless = index_t{1} << 32;
  CHECK(blends({.height = endless, .width = endless}, 7, {{1}}) ==
        local + "1 maps of 4294967296 x 4294967296 are too large");
  CHECK(blends({}, index_t{1} << 62, {{0}, {1}, {0}, {1}}) ==
        local + "4 prompts of 4611686018427387904 tokens are too large");
  tensor<double, 2> attention({3, 12}), of_two({2, 12}), of_more({3, 13});
  const auto add = [&](const auto& x) { return refusal([&] { blend.add(x.view()); }); };
  CHECK(add(attention) == "no error");
  CHECK(add(of_two) ==
        "mlkit::shape_error: attention::local_blend::add: attention has 2 rows, but local_blend's prompts has 3");
  CHECK(add(of_more) ==
        "mlkit::shape_error: attention::local_blend::add: attention has 13 columns, but local_blend's pixels has 12");
  CHECK(refusal([&] { (void)blend.region(3); }) ==
        "mlkit::value_error: attention::local_blend::region: prompt 3 is outside [0, 3)");
  tensor<float, 4> latents({2, 1, 6, 8});
  CHECK(refusal([&] { blend.apply(cpu{}, 0, latents); }) ==
        "mlkit::shape_error: attention::local_blend::apply: latents has 2 batches, but local_blend's prompts has 3");
}
