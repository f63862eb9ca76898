// Windows of steps for the tests of advantages and returns, and what each step of them means, resolved one by one.
#pragma once

#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <mlkit/core/random.hpp>
#include <mlkit/rl/rollout.hpp>
#include <string>
#include <vector>

namespace rollouts {

namespace rl = mlkit::rl;
using mlkit::index_t;

inline constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

inline std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

enum class layout { rows, columns, strided };

// A matrix of T in some layout, and its view.
template <class T>
struct stored {
  std::vector<T> data;
  index_t batch = 0, time = 0, row = 0, step = 0;

  stored() = default;
  template <class From>
  stored(const std::vector<From>& values, index_t b, index_t t, layout l) : batch(b), time(t) {
    row = l == layout::rows ? t : l == layout::columns ? 1 : 3 * t + 5;
    step = l == layout::rows ? 1 : l == layout::columns ? b : 3;
    data.assign(at(b * t * (l == layout::strided ? 3 : 1) + 5 * b + 1), T{});
    if (values.empty()) return;
    for (index_t i = 0; i < b; ++i)
      for (index_t j = 0; j < t; ++j) data[at(i * row + j * step)] = static_cast<T>(values[at(i * t + j)]);
  }
  mlkit::tensor_view<T, 2> view() { return {data.data(), {batch, time}, {row, step}}; }
  T operator()(index_t i, index_t j) const { return data[at(i * row + j * step)]; }
  std::vector<T> plain() const {
    std::vector<T> x;
    for (index_t i = 0; i < batch; ++i)
      for (index_t j = 0; j < time; ++j) x.push_back((*this)(i, j));
    return x;
  }
};

// A step that counts: what follows it, and why the episode goes no further in this window, if it does not.
struct step {
  index_t t;
  double following;
  enum { goes_on, terminated, truncated, window_end } kind;
};

struct window {
  index_t batch, time;
  std::vector<double> r, v, fv, log_ratio, expected, q;
  std::vector<std::uint8_t> te, tr, mask;
  std::vector<double> boot;            // empty: final values serve
  std::vector<std::uint8_t> lte, ltr;  // with `begins`
  std::vector<std::int32_t> starts;    // of packed sequences
  bool begins = false;

  index_t sequences() const { return starts.empty() ? batch : static_cast<index_t>(starts.size()) - 1; }
  bool counts(index_t i) const { return mask.empty() || mask[at(i)]; }

  // The steps of sequence s that count, in order; i = b * time + t.
  std::vector<index_t> counted(index_t s) const {
    std::vector<index_t> steps;
    const index_t first = starts.empty() ? s * time : starts[at(s)],
                  last = starts.empty() ? (s + 1) * time : starts[at(s + 1)];
    for (index_t i = first; i < last; ++i)
      if (counts(i)) steps.push_back(i);
    return steps;
  }
  std::vector<step> resolve(index_t s) const {
    const std::vector<index_t> steps = counted(s);
    std::vector<step> resolved;
    for (std::size_t k = 0; k < steps.size(); ++k) {
      const index_t i = steps[k];
      const bool last = k + 1 == steps.size();
      bool ended = te[at(i)], cut = tr[at(i)];
      if (begins) ended = last ? lte[at(s)] : te[at(steps[k + 1])], cut = last ? ltr[at(s)] : tr[at(steps[k + 1])];
      if (ended)
        resolved.push_back({i, 0, step::terminated});
      else if (cut)
        resolved.push_back({i, fv[at(i)], step::truncated});
      else if (last)
        resolved.push_back({i, boot.empty() ? fv[at(i)] : boot[at(s)], step::window_end});
      else
        resolved.push_back({i, v[at(steps[k + 1])], step::goes_on});
    }
    return resolved;
  }
};

struct kind {
  bool begins = false, masked = false, bootstrap = false;
  std::vector<std::int32_t> starts = {};
  double done = 0.05;
};

inline window make_window(index_t batch, index_t time, const kind& k, std::uint64_t seed = 1) {
  const mlkit::random_stream random{seed, 7};
  std::uint64_t next = 0;
  const auto number = [&] { return random.normal(next++); };
  const auto coin = [&](double p) { return static_cast<std::uint8_t>(random.uniform(next++) < p); };
  window w{batch, time, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, k.starts, k.begins};
  for (index_t i = 0; i < batch * time; ++i) {
    // Floats, so that both types are given the same.
    for (auto* x : {&w.r, &w.v, &w.fv, &w.log_ratio, &w.expected, &w.q})
      x->push_back(static_cast<double>(static_cast<float>(number())));
    w.te.push_back(coin(k.done)), w.tr.push_back(coin(k.done));
    if (k.masked) w.mask.push_back(!coin(0.3));
  }
  if (k.masked) {  // a row without any step that counts, one with a single one, one with a long gap
    const auto row = [&](index_t b) { return w.mask.begin() + b * time; };
    if (batch > 2) std::fill_n(row(1), time, std::uint8_t{0});
    if (batch > 3) std::fill_n(row(2), time, std::uint8_t{0}), *(row(2) + time / 2) = 1;
    if (batch > 4) std::fill(row(3) + time / 3, row(3) + time - time / 4, std::uint8_t{0});
  }
  for (index_t s = 0; s < w.sequences(); ++s) {
    if (k.bootstrap) w.boot.push_back(static_cast<double>(static_cast<float>(number())));
    w.lte.push_back(coin(0.2)), w.ltr.push_back(coin(0.2));
  }
  // What must not be read into a result is NaN.
  std::vector<bool> read(w.fv.size());
  for (index_t s = 0; s < w.sequences(); ++s)
    for (const step& x : w.resolve(s))
      read[at(x.t)] = x.kind == step::truncated || (x.kind == step::window_end && !k.bootstrap);
  for (std::size_t i = 0; i < read.size(); ++i) {
    if (!read[i]) w.fv[i] = not_a_number;
    if (w.counts(static_cast<index_t>(i))) continue;
    for (auto* x : {&w.r, &w.v, &w.log_ratio, &w.expected, &w.q}) (*x)[i] = not_a_number;
  }
  return w;
}

// A window in the types and the layout that a call is given.
template <class T>
struct arguments {
  window w;
  layout l;
  stored<T> r, v, fv, log_ratio, expected, q;
  stored<std::uint8_t> te, tr, mask;
  std::vector<T> boot;

  arguments(const window& from, layout how) : w(from), l(how) {
    const auto put = [&](auto& to, const auto& values) { to = {values, w.batch, w.time, l}; };
    put(r, w.r), put(v, w.v), put(fv, w.fv), put(log_ratio, w.log_ratio), put(expected, w.expected), put(q, w.q);
    put(te, w.te), put(tr, w.tr);
    if (!w.mask.empty()) put(mask, w.mask);
    boot.assign(w.boot.begin(), w.boot.end());
  }
  stored<T> out() const { return {std::vector<T>(), w.batch, w.time, l}; }

  // What all kinds of rollouts have.
  template <class Rollout>
  void give(Rollout& in) {
    in.rewards = r.view();
    in.terminated = te.view(), in.truncated = tr.view(), in.final_values = fv.view();
    if (!boot.empty()) in.bootstrap = boot;
    if (!w.mask.empty()) in.mask = mask.view();
    if (!w.starts.empty()) in.cu_seqlens = w.starts;
    if (w.begins) in.last_terminated = w.lte, in.last_truncated = w.ltr;
  }
  rl::rollout<T> rollout() {
    rl::rollout<T> in;
    give(in);
    in.values = v.view();
    return in;
  }
};

// Shapes with tails in every direction, more than one part of a sequence, fewer and more sequences than lanes.
inline const std::vector<std::pair<index_t, index_t>> shapes{{1, 1},   {3, 7},    {37, 1},  {5, 16},  {2, 257},
                                                             {16, 32}, {19, 530}, {70, 45}, {1, 1100}};

inline std::vector<kind> kinds() {
  return {
      {}, {.bootstrap = true}, {.masked = true}, {.begins = true}, {.begins = true, .masked = true, .bootstrap = true}};
}

// Packed sequences of many lengths, none among them.
inline const std::vector<std::int32_t> packed_starts{0, 5, 5, 6, 300, 316, 800, 801, 1313, 1340};

// Calls f(window, kind's text) for windows of all shapes and kinds.
template <class F>
void each_window(F&& f) {
  for (const auto& [b, t] : shapes)
    for (const kind& k : kinds()) f(make_window(b, t, k));
  for (const bool begins : {false, true})
    for (const bool bootstrap : {false, true})
      f(make_window(1, packed_starts.back(), {.begins = begins, .bootstrap = bootstrap, .starts = packed_starts}));
}

inline std::string text(const window& w) {
  return "[" + std::to_string(w.batch) + ", " + std::to_string(w.time) + "]" + (w.begins ? " begins" : "") +
         (w.mask.empty() ? "" : " masked") + (w.boot.empty() ? "" : " bootstrap") + (w.starts.empty() ? "" : " packed");
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// The largest difference from what is wanted, relative to numbers above 1; infinite where one is NaN and the other not.
template <class T>
double error(const std::vector<T>& have, const std::vector<double>& want) {
  double worst = have.size() == want.size() ? 0 : INFINITY;
  for (std::size_t i = 0; i < want.size() && worst < INFINITY; ++i) {
    const double e = std::fabs(static_cast<double>(have[i]) - want[i]) / std::max(1.0, std::fabs(want[i]));
    worst = std::isnan(e) ? INFINITY : std::max(worst, e);
  }
  return worst;
}

template <class T>
inline constexpr double tolerance = sizeof(T) == 8 ? 1e-13 : 4e-6;

// What a call writes, [output][step]; `run` takes (executor, arguments<T>&, outputs as stored<T>&...).
template <class T>
using outputs = std::vector<std::vector<T>>;

// The same bits in all layouts, for all numbers of threads, and for a sequence on its own, packed or beside others.
template <class T, class Run>
void check_bits(Run&& run) {
  const auto bits = [&](const window& w, layout l, int threads) {
    arguments<T> given(w, l);
    return run(mlkit::cpu{.threads = threads}, given);
  };
  // Few ends of episodes, so that much goes from one part of a sequence to the next.
  for (const auto& [b, t] : std::vector<std::pair<index_t, index_t>>{{3, 7}, {2, 700}, {41, 530}, {1, 4500}}) {
    const window w = make_window(b, t, {.masked = b == 41, .bootstrap = true, .done = 0.001});
    const outputs<T> want = bits(w, layout::rows, 1);
    for (const layout l : {layout::rows, layout::columns, layout::strided})
      for (const int threads : {1, 2, 3, 8}) {
        INFO(text(w) << ", layout " << static_cast<int>(l) << ", threads " << threads);
        const outputs<T> have = bits(w, l, threads);
        for (std::size_t o = 0; o < want.size(); ++o) CHECK(same_bits(have[o], want[o]));
      }
  }
  // Each sequence alone: of a packed batch, and of one with enough rows to be scanned side by side.
  for (const window& w :
       {make_window(1, packed_starts.back(), {.bootstrap = true, .starts = packed_starts, .done = 0.001}),
        make_window(40, 600, {.bootstrap = true, .done = 0.001})}) {
    const outputs<T> all = bits(w, layout::rows, 2);
    for (index_t s = 0; s < w.sequences(); ++s) {
      const index_t first = w.starts.empty() ? s * w.time : w.starts[at(s)],
                    last = w.starts.empty() ? first + w.time : w.starts[at(s + 1)];
      const auto cut = [&](const auto& x) {
        return std::remove_cvref_t<decltype(x)>(x.begin() + first, x.begin() + last);
      };
      const auto of = [&](const auto& x) { return std::remove_cvref_t<decltype(x)>{x[at(s)]}; };
      const window one{1,        last - first, cut(w.r),  cut(w.v), cut(w.fv),  cut(w.log_ratio), cut(w.expected),
                       cut(w.q), cut(w.te),    cut(w.tr), {},       of(w.boot), of(w.lte),        of(w.ltr),
                       {},       false};
      const outputs<T> have = bits(one, layout::rows, 1);
      INFO(text(w) << ", sequence " << s);
      for (std::size_t o = 0; o < all.size(); ++o) CHECK(same_bits(have[o], cut(all[o])));
    }
  }
}

}  // namespace rollouts
