// LoRA's products on a GPU: which kernel computes which.
#pragma once

#include "../../matmul/cuda/cublaslt.cuh"
#include "../../matmul/cuda/simt.cuh"
#include "../../matmul/cuda/thin.cuh"
#include "../../matmul/cuda/tile.cuh"
#include "../../matmul/cuda/warpgroup.cuh"
#include "elements.cuh"

namespace MLKIT_NAMESPACE::lora::detail {

namespace simt = mlkit::detail::simt;
namespace thin = mlkit::detail::thin;
namespace tile = mlkit::detail::tile;
namespace warpgroup = mlkit::detail::warpgroup;
using mlkit::detail::device_product;
using mlkit::detail::is_half;
using mlkit::detail::reached_by_vectors;

template <class Source>
inline constexpr bool is_decoded = !mlkit::detail::is_dense<Source>;
template <class Base>
using base_source_t = typename decltype(right_operand(std::declval<const Base&>().weight()))::source_type;

// The type that x meets a weight in: their own where it is the same 16-bit one, or where the weight is decoded to it.
template <class X, class Source>
using device_type_t = std::conditional_t<
    std::is_same_v<X, double>, double,
    std::conditional_t<is_half<X> && (is_decoded<Source> || std::is_same_v<X, typename Source::value_type>), X, float>>;

// Whether the 16-bit tile kernel can read an operand: dense ones of its type by vectors, decoded ones always.
template <class E, class Source>
bool tiles_read(const operand<Source>& op) noexcept {
  if constexpr (is_decoded<Source>)
    return true;
  else if constexpr (std::is_same_v<Source, dense_source<E>>)
    return op.depth() == 0 || reached_by_vectors(op);
  else
    return false;
}
template <class E, class... Sources>
inline constexpr bool tiles_can_read = is_half<E> &&
                                       ((is_decoded<Sources> || std::is_same_v<Sources, dense_source<E>>)&&...);

// Multiplications from which on a library's kernel, of one launch for each product, beats a kernel of mlkit's.
inline constexpr double worth_a_library = 1 << 20;

/// c = stage(left right + left2 right2), in E: by cuBLASLt where the operands are dense and the stage is a factor, a
/// bias and a sum with c; else by a kernel that does it all at once.
template <class E, class Left, class Right, class Left2, class Right2, class C, class A, class B>
void multiply_on(std::string_view function, const cuda& exec, const operand<Left>& left, const operand<Right>& right,
                 const operand<Left2>& left2, const operand<Right2>& right2, const matrix_view<C>& c,
                 const finish<A, B, C>& stage) {
  if (c.empty()) return;
  if constexpr (std::is_same_v<Left, dense_source<E>> && std::is_same_v<Right, dense_source<E>> &&
                std::is_same_v<Left2, dense_source<E>> && std::is_same_v<Right2, dense_source<E>>) {
    const bool plain =
        !stage.rows && !stage.columns && !stage.row_bias && !stage.last && !stage.kept &&
        (!stage.bias || std::is_same_v<B, C>)&&(
            !stage.add || (stage.add == c.data && stage.add_row == c.stride(0) && stage.add_column == c.stride(1)));
    const double work = static_cast<double>(c.size()) * static_cast<double>(left.depth());
    const C* bias = nullptr;
    if constexpr (std::is_same_v<B, C>) bias = stage.bias;
    if (plain && work >= worth_a_library &&
        multiply_plainly<E, C>(function, exec, left, right, c, stage.value, bias, stage.add != nullptr)) {
      if (left2.depth() == 0 || multiply_plainly<E, C>(function, exec, left2, right2, c, stage.value, nullptr, true))
        return;
      const auto none = nothing<E>(0);
      finish<A, B, C> rest{.value = stage.value};
      rest.adding(c);
      return simt::run<A>(
          function, exec,
          device_product<Left2, Right2, Left, Right, C, finish<A, B, C>>{left2, right2, none, none, c, rest});
    }
  }
  const device_product<Left, Right, Left2, Right2, C, finish<A, B, C>> p{left, right, left2, right2, c, stage};
  if constexpr (tiles_can_read<E, Left, Right, Left2, Right2>)
    if (tiles_read<E>(left) && tiles_read<E>(right) && tiles_read<E>(left2) && tiles_read<E>(right2))
      return tile::launch_product<E>(function, exec, p);
  simt::run<A>(function, exec, p);
}
template <class E, class Left, class Right, class C, class A, class B>
void multiply_on(std::string_view function, const cuda& exec, const operand<Left>& left, const operand<Right>& right,
                 const matrix_view<C>& c, const finish<A, B, C>& stage) {
  multiply_on<E>(function, exec, left, right, nothing<E>(left.lines()), nothing<E>(right.lines()), c, stage);
}

/// What a thin kernel is given without an adapter's part.
template <class Stage, class E, class Source, class C>
auto thin_problem(const operand<Source>& wide, const matrix_view<const E>& few, const matrix_view<C>& c,
                  bool wide_is_rows, const Stage& stage) {
  thin::problem<E, Source, E, C, Stage> p{};
  p.wide = wide.source;
  p.wide_lines = wide.lines();
  p.depth = wide.depth();
  p.few = few.data;
  p.few_stride = few.extent(0) == 1 ? few.extent(1) : few.stride(0);
  p.few_lines = static_cast<int>(few.extent(0));
  p.c = c;
  p.wide_is_rows = wide_is_rows;
  p.stage = stage;
  return p;
}

// h = s x A^T in E, where h may have more columns than A has lines: those become 0. The stage is the one of the product
// that follows, as far as its type goes, so that they share their kernels. `most_blocks` multiprocessors are enough.
template <class Bias, class E, class X>
void project_down_on(std::string_view function, const cuda& exec, const matrix_view<const X>& x,
                     const matrix_view<const E>& a, double scale, const matrix_view<E>& h, int most_blocks = 0) {
  using A = accumulator_t<E>;
  const finish<A, Bias, E> stage{.value = static_cast<A>(scale)};
  if constexpr (!std::is_same_v<E, double> && std::is_same_v<X, E>) {
    const auto left = left_of(x), right = left_of(a);
    if (reached_by_vectors(left) && reached_by_vectors(right)) {
      if (x.extent(0) <= thin::most_lines) return thin::run(function, exec, thin_problem(right, x, h, false, stage));
      if constexpr (is_half<E>)
        if (a.extent(0) <= thin::most_many) {
          auto p = thin_problem(left, a, h, true, stage);
          p.most_blocks = most_blocks;
          return thin::run_many(function, exec, p);
        }
    }
  }
  matrix_view<E> inside = h;
  inside.extents[1] = a.extent(0);
  if (inside.extent(1) < h.extent(1)) each_element(function, exec, h.extent(0), h.extent(1), convert<E, E>{{}, h});
  multiply_on<E>(function, exec, left_of(x), right_of(transposed(a)), inside, stage);
}

}  // namespace MLKIT_NAMESPACE::lora::detail
