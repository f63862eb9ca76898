// Windows of steps on the device, and the recurrences of rl in loops of doubles, for the tests of scans.
#pragma once

#include <executor.hpp>

#include "../rl/rollouts.hpp"

namespace scans {

using namespace rollouts;

// A matrix of T in some layout in the executor's memory, `shift` elements behind where its memory starts.
template <class T>
class placed {
 public:
  placed() = default;
  template <class From>
  placed(const test::executor& exec, const std::vector<From>& values, index_t b, index_t t, layout l, index_t shift = 0)
      : host_(values, b, t, l), shift_(shift) {
    if (values.empty()) std::fill(host_.data.begin(), host_.data.end(), T(7));  // outputs: which must be overwritten
    std::vector<T> all(at(shift), T{});
    all.insert(all.end(), host_.data.begin(), host_.data.end());
    memory_ = test::on_device(exec, all);
  }
  mlkit::tensor_view<T, 2> view() {
    return {memory_.view().data + shift_, {host_.batch, host_.time}, {host_.row, host_.step}};
  }
  std::vector<T> plain(const test::executor& exec) {
    const auto all = test::to_host(exec, memory_);
    std::copy_n(all.data() + shift_, host_.data.size(), host_.data.begin());
    return host_.plain();
  }

 private:
  stored<T> host_;
  index_t shift_ = 0;
  test::operand<T, 1> memory_;
};

template <class T>
class vector_of {
 public:
  vector_of() = default;
  template <class From>
  vector_of(const test::executor& exec, const std::vector<From>& values) : given_(!values.empty()) {
    const std::vector<T> x(values.begin(), values.end());
    if (given_) memory_ = test::on_device(exec, x);
  }
  explicit operator bool() const { return given_; }
  mlkit::tensor_view<const T, 1> view() { return memory_.view(); }

 private:
  bool given_ = false;
  test::operand<T, 1> memory_;
};

// A window in the executor's memory.
template <class T>
struct device_window {
  const test::executor exec = test::exec();
  window w;
  layout l;
  index_t shift;
  placed<T> r, v, fv, log_ratio, expected, q;
  placed<std::uint8_t> te, tr, mask;
  vector_of<T> boot;
  vector_of<std::uint8_t> lte, ltr;
  vector_of<std::int32_t> starts;

  device_window(const window& from, layout how, index_t shifted = 0) : w(from), l(how), shift(shifted) {
    const auto put = [&](auto& to, const auto& values) { to = {exec, values, w.batch, w.time, l, shift}; };
    put(r, w.r), put(v, w.v), put(fv, w.fv), put(log_ratio, w.log_ratio), put(expected, w.expected), put(q, w.q);
    put(te, w.te), put(tr, w.tr);
    if (!w.mask.empty()) put(mask, w.mask);
    boot = {exec, w.boot}, lte = {exec, w.lte}, ltr = {exec, w.ltr}, starts = {exec, w.starts};
  }
  placed<T> out() const { return {exec, std::vector<T>(), w.batch, w.time, l, shift}; }

  template <class Rollout>
  Rollout give() {
    Rollout in;
    in.rewards = r.view();
    in.terminated = te.view(), in.truncated = tr.view(), in.final_values = fv.view();
    if (boot) in.bootstrap = boot.view();
    if (!w.mask.empty()) in.mask = mask.view();
    if (starts) in.cu_seqlens = starts.view();
    if (w.begins) in.last_terminated = lte.view(), in.last_truncated = ltr.view();
    return in;
  }
};

// Calls f(done convention) for that of the window.
template <class F>
void with_convention(const window& w, F&& f) {
  if (w.begins)
    f(rl::done_begins{});
  else
    f(rl::done_ends{});
}

// step(resolved steps, k, what the step behind gave): the outputs of step k, each sequence from its end.
template <class Step>
outputs<double> backwards(const window& w, std::size_t count, Step&& step) {
  outputs<double> out(count, std::vector<double>(at(w.batch * w.time)));
  for (index_t s = 0; s < w.sequences(); ++s) {
    const std::vector<rollouts::step> steps = w.resolve(s);
    std::vector<double> behind(count);
    for (std::size_t k = steps.size(); k-- > 0;) {
      behind = step(steps, k, behind);
      for (std::size_t o = 0; o < count; ++o) out[o][at(steps[k].t)] = behind[o];
    }
  }
  return out;
}

// Windows that take every way through the kernels: short rows, one group, several, few long ones; columns.
inline const std::vector<std::pair<index_t, index_t>> wide_shapes{{1, 1},   {3, 7},    {37, 1},   {5, 16},   {9, 128},
                                                                  {2, 257}, {19, 530}, {3, 1030}, {2, 2600}, {1, 4500}};

// Calls f(window, layout, shift): each shape with a kind, each kind with some shapes, packed sequences.
template <class F>
void each_case(F&& f) {
  std::size_t n = 0;
  const std::vector<kind> all = kinds();
  const auto shape = [&](index_t b, index_t t, const kind& k) {
    for (const layout l : {layout::rows, layout::columns, layout::strided})
      if (l != layout::strided || n % 3 == 0) f(make_window(b, t, k, n), l, index_t(n % 3 == 1));
    ++n;
  };
  for (const auto& [b, t] : wide_shapes) shape(b, t, all[n % all.size()]);
  for (const kind& k : all)
    for (const auto& [b, t] : std::vector<std::pair<index_t, index_t>>{{8, 31}, {5, 400}, {40, 150}}) shape(b, t, k);
  shape(1, 5000, all[2]);
  for (const bool begins : {false, true})
    for (const bool bootstrap : {false, true})
      f(make_window(1, packed_starts.back(), {.begins = begins, .bootstrap = bootstrap, .starts = packed_starts}),
        layout::rows, index_t{bootstrap});
  f(make_window(1, 9500, {.bootstrap = true, .starts = {0, 9000, 9004, 9500}, .done = 0.001}), layout::rows,
    index_t{0});
}

inline std::string text(const window& w, layout l, index_t shift) {
  return rollouts::text(w) + ", layout " + std::to_string(static_cast<int>(l)) + ", shift " + std::to_string(shift);
}

// run(device_window<T>&) gives the outputs that want(window) says.
template <class T, class Run, class Want>
void check_against(Run&& run, Want&& want, double times = 1) {
  each_case([&](const window& w, layout l, index_t shift) {
    INFO(text(w, l, shift));
    device_window<T> given(w, l, shift);
    const outputs<T> have = run(given);
    const outputs<double> right = want(w);
    for (std::size_t o = 0; o < right.size(); ++o) {
      INFO("output " << o);
      CHECK(error(have[o], right[o]) < times * tolerance<T>);
    }
  });
}

}  // namespace scans
