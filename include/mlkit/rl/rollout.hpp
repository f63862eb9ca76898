// What advantages and returns are computed from: rewards, values, and where episodes end.
#pragma once

#include "scan.hpp"

namespace MLKIT_NAMESPACE::rl {

/// A window of steps of `batch` environments, [batch, time], or packed sequences, [tokens]. In time-major storage the
/// members are transposed views. Terminated and truncated are separate: behind a terminated step there is no value;
/// behind a truncated one there is that of the observation in which the episode was cut off, which the window does not
/// hold (the next step's belongs to the next episode). A step that is both is terminated.
template <class T = float>
struct rollout {
  sequence_view<const T> rewards = {};  ///< r_t
  sequence_view<const T> values = {};   ///< V_t, of the observation that step t started from
  flag_view terminated = {};            ///< the step ended an episode in a terminal state
  flag_view truncated = {};             ///< the step's episode was cut off behind it
  sequence_view<const T> final_values =
      {};                              ///< of the observation behind step t; read at truncations and windows' ends
  batch_view<const T> bootstrap = {};  ///< [batch] of the observation behind the window, instead of final_values'
  batch_flags last_terminated = {};    ///< [batch] with done_begins: the window's last step was terminated
  batch_flags last_truncated = {};     ///< [batch] with done_begins: the window's last step was truncated
  flag_view mask = {};                 ///< steps that count; others are passed over, whatever they hold
  sequence_starts cu_seqlens = {};     ///< [batch + 1] starts of packed sequences
};

namespace detail {

/// Checks the arguments of one call, and hands them over to its problem.
template <class Problem>
class scan_call {
 public:
  using T = typename Problem::value_type;

  template <executor Executor>
  scan_call(std::string_view function, const Executor& exec, Problem& p)
      : function_(function), call_(function, exec), steps_(call_, function, looks_at_data<Executor>), p_(p) {}

  /// The first of them; all others have its shape.
  void steps(std::string_view name, const sequence_view<const T>& v, const sequence_starts& starts,
             stream<const T>& to) {
    const sequence_places& places = steps_.first(name, v, starts);
    p_.batch = v.extent(0), p_.time = v.extent(1);
    p_.sequences = places.sequences, p_.starts = places.starts;
    read(name, v, to);
  }
  template <class U>
  void read(std::string_view name, const tensor_view<U, 2>& v, stream<U>& to) {
    steps_.read(name, v);
    to = stream<U>(v);
  }
  template <class U>
  void read_optional(std::string_view name, const tensor_view<U, 2>& v, stream<U>& to) {
    if (is_given(v)) read(name, v, to);
  }
  template <class U>
  void read_optional(std::string_view name, const tensor_view<U, 1>& v, stream<U>& to) {
    if (!is_given(v)) return;
    steps_.read_batch(name, v, p_.starts ? "the number of sequences" : steps_.first_name());
    to = stream<U>(v);
  }
  void mask(const flag_view& v) {
    if (!is_given(v)) return;
    if (p_.starts) fail_value(function_, ": mask and cu_seqlens are both given; packed tokens all count");
    read("mask", v, p_.mask);
  }
  void write(std::string_view name, const sequence_view<T>& v, stream<T>& to) {
    steps_.write(name, v);
    to = stream<T>(v);
  }
  void write_optional(std::string_view name, const sequence_view<T>& v, stream<T>& to) {
    if (is_given(v)) write(name, v, to);
  }

  /// What all kinds of rollouts have.
  template <class Done, class Rollout>
  void episodes(const Rollout& in) {
    static_assert(done_convention<Done>, "rl: the last argument is done_ends{} or done_begins{}");
    read_optional("terminated", in.terminated, p_.terminated);
    read_optional("truncated", in.truncated, p_.truncated);
    read_optional("final_values", in.final_values, p_.final_values);
    read_optional("bootstrap", in.bootstrap, p_.bootstrap);
    p_.begins = Done::begins;
    if constexpr (Done::begins) {
      read_optional("last_terminated", in.last_terminated, p_.last_terminated);
      read_optional("last_truncated", in.last_truncated, p_.last_truncated);
    } else if (in.last_terminated.extent(0) > 0 || in.last_truncated.extent(0) > 0) {
      fail_value(function_, ": last_terminated and last_truncated go with done_begins");
    }
    mask(in.mask);
  }

 private:
  std::string_view function_;
  arguments call_;
  step_arguments steps_;
  Problem& p_;
};

}  // namespace detail

/// What affine_scan may be told beside its inputs.
template <class T = float>
struct scan_options {
  batch_view<const T> seed = {};    ///< [batch] x behind the last step; 0 where it is not given
  flag_view mask = {};              ///< steps that count; others pass x through, whatever the inputs hold there
  sequence_starts cu_seqlens = {};  ///< [batch + 1] starts of packed sequences
};

/// out[b, t] = a out[b, t + 1] + b', where {a, b'} = f(inputs[b, t]...) is an affine<T>: any recurrence of this kind,
/// backward in time, from maps that are computed as they are needed. f takes a T of each input and is inlined, compiled
/// for the instruction set that runs. a = 0 cuts: what lies behind is not looked at, NaN or not. A masked step is the
/// identity map, and out there is the value that passes through.
///
/// inputs and out are [batch, time]; time-major storage is a transposed view, as is any other stride; or [tokens] of
/// packed sequences. f32 or f64. Sequences are cut into parts of 256 steps, whose maps are composed: the bits depend on
/// a sequence's own steps alone, not on the layout, its neighbours or the number of threads. Throws shape_error where
/// shapes differ or out overlaps an input, value_error for a mask beside cu_seqlens. Reads each input once (twice from
/// cache where there are few long sequences) and writes out once. Blelloch, Prefix sums and their applications, 1990.
///
/// With a mlkit::cuda f is a functor that device code can call (MLKIT_HOST_DEVICE); parts are of 1024 steps, or of 96
/// where sequences lie side by side, and where the product of a part's factors a is above the largest number, out is
/// NaN or infinite from there to the front, also where the recurrence itself would be finite.
template <class T = float, executor Executor, class F, class... Inputs>
  requires(sizeof...(Inputs) > 0 && ((viewable<const Inputs, 1> || viewable<const Inputs, 2>)&&...))
void affine_scan(const Executor& exec, const F& f, const scan_options<std::type_identity_t<T>>& options,
                 const sequence_view<std::type_identity_t<T>>& out, const Inputs&... inputs) {
  constexpr std::string_view function = "rl::affine_scan";
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>, "rl: scans are of float or double");
  static_assert((std::is_same_v<element_t<const Inputs>, T> && ...),
                "rl: affine_scan's inputs have one type, which affine_scan<double> names where it is not float");
  using Rule = detail::affine_rule<T, static_cast<int>(sizeof...(Inputs)), F>;
  detail::scan_problem<Rule> p{.rule = {f}};
  detail::scan_call<detail::scan_problem<Rule>> call(function, exec, p);
  int i = 0;
  const auto input = [&](const sequence_view<const T>& v) {
    const std::string name = detail::message("input ", i);
    if (i == 0)
      call.steps("input 0", v, options.cu_seqlens, p.in[0]);
    else
      call.read(name, v, p.in[static_cast<std::size_t>(i)]);
    ++i;
  };
  (input(inputs), ...);
  call.read_optional("seed", options.seed, p.bootstrap);
  call.mask(options.mask);
  call.write("out", out, p.out[0]);
  run_scan(function, exec, p, detail::scan_needs{.finite_rewards = false, .end_values = false});
}

}  // namespace MLKIT_NAMESPACE::rl
