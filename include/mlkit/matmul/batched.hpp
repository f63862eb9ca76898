// Many matrix products in one call: batches of one shape, and groups of any shapes.
#pragma once

#include <ranges>

#include "matmul.hpp"

namespace MLKIT_NAMESPACE {

/// One product of a group: c = epilogue(a b). Views: a [m, k], b [k, n], c [m, n].
template <class A, class B, class C>
struct matmul_problem {
  matrix_view<const A> a;
  matrix_view<const B> b;
  matrix_view<C> c;
};

namespace detail {

// A product of at least this many multiplications a thread keeps all threads busy by itself.
inline constexpr double work_alone = 8 * work_per_thread;

// run(i, exec) for every i in [0, count): those with much work(i) one after another on all threads, the others side by
// side, each on one thread, in contiguous parts of equal work.
template <class Work, class Run>
void run_many(const cpu& exec, index_t count, const Work& work, const Run& run) {
  const double alone = work_alone * concurrency(exec);
  double together = 0;
  for (index_t i = 0; i < count; ++i) {
    if (work(i) >= alone)
      run(i, exec);
    else
      together += work(i);
  }
  const cpu limited = limit_threads(exec, together);
  const int parts = concurrency(limited);
  parallel_ranges(limited, parts, [&](index_t begin, index_t end) {
    const double from = together * static_cast<double>(begin) / parts, to = together * static_cast<double>(end) / parts;
    double before = 0;
    for (index_t i = 0; i < count; ++i) {
      const double own = work(i);
      if (own >= alone) continue;
      const double middle = before + own / 2;
      before += own;
      if (middle >= from && (middle < to || end == parts)) run(i, cpu{.threads = 1});
    }
  });
}

template <class T>
matrix_view<T> slice(const tensor_view<T, 3>& v, index_t i) noexcept {
  return {v.data + i * v.strides[0], {v.extents[1], v.extents[2]}, {v.strides[1], v.strides[2]}};
}

// Rows of all batches as one matrix, where they are evenly spaced.
template <class T>
bool stacked(const tensor_view<T, 3>& v) noexcept {
  return v.strides[0] == v.extents[1] * v.strides[1];
}
template <class T>
matrix_view<T> stack(const tensor_view<T, 3>& v) noexcept {
  return {v.data, {v.extents[0] * v.extents[1], v.extents[2]}, {v.strides[1], v.strides[2]}};
}

// Stages that give the same for every row.
template <class Stage>
inline constexpr bool ignores_rows = vectorizable<Stage> || std::is_same_v<Stage, accumulate> ||
                                     (std::is_invocable_v<const Stage&, float> &&
                                      !std::is_invocable_v<const Stage&, float, index_t, index_t>);
template <class T>
inline constexpr bool ignores_rows<add_bias<T>> = true;
template <class T>
inline constexpr bool ignores_rows<scale_columns<T>> = true;

template <class A, class B, class C, class Epilogue>
void check_batched(const A& a, const B& b, const C& c, const Epilogue& e) {
  check_view("matmul", "a", a);
  check_output("matmul", "c", c);
  check_extent("matmul", "a", "matrices", a.extent(0), "c", c.extent(0));
  check_disjoint("matmul", "c", c, "a", a);
  e.check("matmul", c.extent(1), c.extent(2));
  check_epilogue_disjoint("matmul", c, e);
  if constexpr (viewable<const B, 3>) {
    const auto right = as_view(b);
    check_view("matmul", "b", right);
    check_extent("matmul", "b", "matrices", right.extent(0), "c", c.extent(0));
    check_disjoint("matmul", "c", c, "b", right);
    if (c.extent(0) > 0) check_matmul("matmul", slice(a, 0), slice(right, 0), slice(c, 0), e);
  } else {
    check_operand_disjoint("matmul", c, "b", b);
    if (c.extent(0) > 0) check_matmul("matmul", slice(a, 0), b, slice(c, 0), e);
  }
}

}  // namespace detail

/// c[i] = epilogue(a[i] b[i]), with a [batch, m, k], b [batch, k, n] or one b [k, n] for all, c [batch, m, n].
///
/// As matmul in all else: any strides, types and stages; a shared b may be a packed_matrix or a source. Stages see rows
/// and columns of one matrix, so that a bias [n] or a residual [m, n] is shared by all. Many small products are spread
/// over the threads, large ones use all threads each; no memory is allocated for the batch.
template <executor Executor, viewable<3> A, class B, viewable<3> C, class... Stages>
  requires(viewable<const B, 3> || detail::right_matmul_operand<B>)
void matmul(const Executor& exec, const A& a, const B& b, C&& c, const epilogue<Stages...>& e = {}) {
  const tensor_view<const element_t<const A>, 3> left = as_view(a);
  const auto out = as_view(c);
  detail::check_batched(left, b, out, e);
  const double work =
      static_cast<double>(out.extent(1)) * static_cast<double>(out.extent(2)) * static_cast<double>(left.extent(2));
  if constexpr (viewable<const B, 3>) {
    const tensor_view<const element_t<const B>, 3> right = as_view(b);
    detail::run_many(
        exec, out.extent(0), [&](index_t) { return work; },
        [&](index_t i, const cpu& one) {
          detail::multiply(one, detail::slice(left, i), detail::slice(right, i), detail::slice(out, i), e);
        });
  } else {
    if constexpr ((detail::ignores_rows<Stages> && ...))
      if (detail::stacked(left) && detail::stacked(out))
        return detail::multiply(exec, detail::stack(left), b, detail::stack(out), e);
    detail::run_many(
        exec, out.extent(0), [&](index_t) { return work; },
        [&](index_t i, const cpu& one) { detail::multiply(one, detail::slice(left, i), b, detail::slice(out, i), e); });
  }
}

/// problem.c = epilogue(problem.a problem.b) for every problem of a range, each of its own shape:
///
///     std::vector<matmul_problem<float, float, float>> problems{{a0, b0, c0}, {a1, b1, c1}};
///     matmul(exec, problems);
///
/// Problems run in any order and at the same time, so no c may share elements with any other c, a or b; only overlaps
/// within one problem are refused. Errors name the problem, and are found before any c is touched. Large problems use
/// all threads each, the others are spread over the threads by their work.
template <executor Executor, std::ranges::random_access_range Problems, class... Stages>
  requires requires(std::ranges::range_reference_t<const Problems&> p) { p.a.data, p.b.data, p.c.data; }
void matmul(const Executor& exec, const Problems& problems, const epilogue<Stages...>& e = {}) {
  const auto count = static_cast<index_t>(std::ranges::size(problems));
  const auto at = [&](index_t i) -> std::ranges::range_reference_t<const Problems&> {
    return std::ranges::begin(problems)[i];  // a range may make its problems as they are asked for
  };
  for (index_t i = 0; i < count; ++i) {
    const auto& p = at(i);
    try {
      detail::check_matmul("matmul", p.a, p.b, p.c, e);
    } catch (const error&) {
      detail::check_matmul(detail::message("matmul: problem ", i), p.a, p.b, p.c, e);
    }
  }
  detail::run_many(
      exec, count,
      [&](index_t i) {
        const auto& p = at(i);
        return static_cast<double>(p.c.extent(0)) * static_cast<double>(p.c.extent(1)) *
               static_cast<double>(p.a.extent(1));
      },
      [&](index_t i, const cpu& one) {
        const auto& p = at(i);
        detail::multiply(one, p.a, p.b, p.c, e);
      });
}

}  // namespace MLKIT_NAMESPACE
