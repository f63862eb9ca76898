// A base with its adapter as one callable: what layers take for their projections.
#pragma once

#include "dora.hpp"
#include "linear.hpp"
#include "per_row.hpp"

namespace MLKIT_NAMESPACE::lora {

/// The adapter of a projection that has none.
struct no_adapter {};
/// The gradients of a projection that trains nothing.
struct no_gradients {};

namespace detail {

template <class Adapter>
inline constexpr bool is_dora = false;
template <class T, class M>
inline constexpr bool is_dora<dora<T, M>> = true;
template <class Adapter>
inline constexpr bool is_many = false;
template <class P, class I>
inline constexpr bool is_many<per_row<P, I>> = true;
template <class P, class I>
inline constexpr bool is_many<segments<P, I>> = true;
template <class Adapter>
inline constexpr bool is_no_adapter = std::is_same_v<Adapter, no_adapter>;
// One adapter for all tokens, which takes options and has gradients.
template <class Adapter>
inline constexpr bool is_trained = plain_adapter<Adapter> || is_dora<Adapter>;

// What a projection holds of a plain adapter that may own its halves is a view.
template <class Adapter>
struct held_adapter {
  using type = Adapter;
};
template <class T>
struct held_adapter<adapter<T>> {
  using type = adapter_view<T>;
};

struct no_options {};

}  // namespace detail

/// y = x W^T + b with what an adapter adds, as one callable: `projection{base}`, `projection{base, adapter}`, of any
/// linear_base and any kind of adapter that linear takes: plain, dora, per_row, segments. It owns nothing.
///
/// `p(exec, x, y)` is lora::linear, and `p.backward(exec, x, dy, grads, dx)` lora::linear_backward with the gradients
/// of the adapter, or no_gradients where there is none. Adapters of many rows have no backward. A plain adapter or dora
/// takes linear_options, which both calls are given: `p.options.dropout`, `p.options.stream` for each step, `h` and `z`
/// to keep. Errors, types, determinism and cost as for these.
template <linear_base Base, class Adapter = no_adapter>
struct projection {
  static_assert(detail::is_no_adapter<Adapter> || detail::is_trained<Adapter> || detail::is_many<Adapter>,
                "lora: a projection's adapter is a lora::adapter, adapter_view, dora, per_row or segments");
  using sums_type = detail::sums_t<typename Base::value_type>;
  using options_type = std::conditional_t<detail::is_trained<Adapter>, linear_options<sums_type>, detail::no_options>;
  Base base;
  Adapter adapter;
  [[no_unique_address]] options_type options;

  explicit projection(const Base& b) requires(detail::is_no_adapter<Adapter>) : base(b), adapter{}, options{} {}
  projection(const Base& b, const std::type_identity_t<Adapter>& a) : base(b), adapter(a), options{} {}
  projection(const Base& b, const std::type_identity_t<Adapter>& a,
             const options_type& o) requires(detail::is_trained<Adapter>)
      : base(b), adapter(a), options(o) {}

  index_t inputs() const noexcept { return base.inputs(); }
  index_t outputs() const noexcept { return base.outputs(); }

  template <executor Executor, viewable<2> X, viewable<2> Y>
  void operator()(const Executor& exec, const X& x, Y&& y) const {
    if constexpr (detail::is_no_adapter<Adapter>)
      linear(exec, x, base, y);
    else if constexpr (detail::is_many<Adapter>)
      linear(exec, x, base, adapter, y);
    else
      linear(exec, x, base, adapter, y, options);
  }

  template <executor Executor, viewable<2> X, viewable<2> D, class Gradients, viewable<2> Dx>
  void backward(const Executor& exec, const X& x, const D& dy, const Gradients& grads, Dx&& dx) const
      requires(!detail::is_many<Adapter>) {
    if constexpr (detail::is_no_adapter<Adapter>) {
      static_assert(std::is_same_v<Gradients, no_gradients>,
                    "lora: a projection without an adapter trains nothing; its gradients are lora::no_gradients");
      linear_backward(exec, base, dy, dx);
    } else {
      static_assert(!std::is_same_v<Gradients, no_gradients>,
                    "lora: a projection with an adapter has gradients: lora::gradients{da, db}");
      linear_backward(exec, x, base, adapter, dy, grads, dx, options);
    }
  }

  /// For the layer that holds the projection, before it writes anything: refuses what the call above would refuse of
  /// base, adapter and options for so many tokens, and names to `call` what is read and written.
  template <class Call>
  void check(Call& call, std::string_view function, index_t tokens) const {
    detail::check_base(function, base);
    detail::name_base(call, base);
    if constexpr (detail::is_many<Adapter>) {
      using T = typename Adapter::value_type;
      const auto plan = detail::make_plan<T>(function, adapter, tokens, outputs(), inputs());
      for (const adapter_view<T>& p : plan.adapters) detail::name_adapter(call, p);
    } else if constexpr (detail::is_trained<Adapter>) {
      const auto p = plain();
      detail::check_adapter(function, p, outputs(), inputs());
      detail::check_dropout(function, options);
      detail::check_saved(function, options.h, tokens, p.rank());
      detail::name_adapter(call, p);
      if constexpr (detail::is_dora<Adapter>) {
        detail::check_kept(function, options, tokens, outputs());
        detail::check_dora(call, function, adapter, outputs(), inputs());
      } else {
        detail::check_nothing_kept(function, options);
      }
      call.writes("h", options.h);
      call.writes("z", options.z);
    }
  }
  /// The same of the gradients that backward writes.
  template <class Call, class Gradients>
  void check_gradients(Call& call, std::string_view function, const Gradients& grads) const {
    if constexpr (detail::is_trained<Adapter> && !std::is_same_v<Gradients, no_gradients>) {
      detail::check_gradients(call, function, plain(), grads);
      if constexpr (detail::is_dora<Adapter>)
        detail::check_magnitude(call, function, grads, outputs());
      else
        detail::check_no_magnitude(function, grads);
    }
  }

 private:
  auto plain() const noexcept {
    if constexpr (detail::is_dora<Adapter>)
      return adapter.adapter;
    else
      return as_adapter(adapter);
  }
};
template <class Base>
projection(const Base&) -> projection<Base>;
template <class Base, class Adapter>
projection(const Base&, const Adapter&) -> projection<Base, typename detail::held_adapter<Adapter>::type>;
template <class Base, class Adapter>
projection(const Base&, const Adapter&, const linear_options<detail::sums_t<typename Base::value_type>>&)
    -> projection<Base, typename detail::held_adapter<Adapter>::type>;

}  // namespace MLKIT_NAMESPACE::lora
