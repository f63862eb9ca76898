// The tape: a record of what was computed, in order, so that gradients can be carried back through it.
#pragma once

#include <functional>
#include <span>

#include "../core/cpu.hpp"
#include "../core/memory.hpp"
#include "parameter.hpp"

namespace MLKIT_NAMESPACE::nn {

template <real T>
class tape;

/// A value on a tape: a handle, cheap to copy. It is valid until the tape is cleared; later use throws value_error.
template <real T>
class var {
 public:
  var() = default;
  /// Whether this is a value at all: operations take an empty var for an operand that is left out, such as a bias.
  explicit operator bool() const noexcept { return tape_ != nullptr; }

  tape<T>& on() const;
  const nn::shape& shape() const { return node().shape; }
  index_t size() const { return shape().size(); }
  index_t rows() const { return shape().rows(); }
  index_t columns() const { return shape().columns(); }

  /// Whether a gradient flows into this value: it is a trainable parameter, or was computed from one.
  bool needs_grad() const { return node().needs_grad; }
  /// Whether backward has reached it.
  bool has_grad() const { return node().grad != nullptr; }

  T* data() const { return node().value; }
  /// The elements as a matrix [rows, columns] of contiguous rows.
  matrix_view<T> matrix() const { return {data(), {rows(), columns()}}; }
  /// The elements with their own shape. Throws shape_error if the rank is another.
  template <int Rank>
  tensor_view<T, Rank> view() const {
    return {data(), extents<Rank>("var::view")};
  }
  /// The value of a single number.
  T item() const {
    if (size() != 1) detail::fail_shape("nn::var::item: the value has shape ", shape().text(), ", not one element");
    return *data();
  }

  /// The gradient, made and set to zero if there is none yet. Operations add to it in their backward pass.
  T* grad_data() const;
  /// Memory for the gradient, unset, if none has arrived yet: for an operation that writes all of it. Null if one has,
  /// and for a parameter, whose gradient outlives the tape; then the operation must add to grad_data().
  T* fresh_grad() const;
  matrix_view<T> grad() const { return {grad_data(), {rows(), columns()}}; }
  template <int Rank>
  tensor_view<T, Rank> grad_view() const {
    return {grad_data(), extents<Rank>("var::grad_view")};
  }

 private:
  friend class tape<T>;
  struct node_type {
    T* value = nullptr;
    T* grad = nullptr;
    nn::shape shape;
    bool needs_grad = false;
    parameter<T>* source = nullptr;
    std::function<void()> backward;
  };
  var(tape<T>& tape, std::size_t id, std::uint64_t epoch) : tape_(&tape), id_(id), epoch_(epoch) {}
  node_type& node() const;
  template <int Rank>
  extents_t<Rank> extents(std::string_view function) const {
    if (shape().rank() != Rank)
      detail::fail_shape("nn::", function, ": the value has shape ", shape().text(), ", but rank ", Rank,
                         " is asked for");
    extents_t<Rank> e{};
    for (int d = 0; d < Rank; ++d) e[d] = shape()[d];
    return e;
  }

  tape<T>* tape_ = nullptr;
  std::size_t id_ = 0;
  std::uint64_t epoch_ = 0;
};

/// Records operations and runs them backwards.
///
/// Values and gradients live in memory that the tape keeps from one step to the next: clear() forgets what was recorded
/// and frees nothing. One tape serves one thread; its operations use the executor's threads and give the same bits for
/// any number of them.
///
///     nn::tape<float> tape(exec);
///     for (...) {
///       tape.clear();
///       auto y = model(tape.constant(x));
///       tape.backward(nn::mse(y, tape.constant(target)));
///       optimizer.step(exec);
///     }
///
/// An operation of one's own is a function that makes its result with `make`, fills it, and says with `on_backward` how
/// its gradient reaches the inputs; attention and message passing join in the same way.
template <real T>
class tape {
 public:
  /// With record = false nothing is kept for a backward pass: for sampling and evaluation.
  struct options {
    bool record = true;
  };

  /// Throws value_error for a number of threads that cannot be.
  explicit tape(cpu exec = {}) : tape(exec, options{}) {}
  tape(cpu exec, options o) : exec_(exec), record_(o.record) { detail::check_executor(exec); }
  tape(const tape&) = delete;
  tape& operator=(const tape&) = delete;

  const cpu& exec() const noexcept { return exec_; }

  /// Forgets all values; their memory is used again.
  void clear() noexcept {
    nodes_.clear();
    ++epoch_;
    chunk_ = used_ = 0;
    ran_ = false;
  }

  /// A value without a gradient, copied from a view of any rank up to four.
  template <class X>
    requires requires(X& x) { as_view(x); }
  var<T> constant(X&& x) { return copied(as_view(x), false); }
  /// A value whose gradient can be asked for after backward.
  template <class X>
    requires requires(X& x) { as_view(x); }
  var<T> input(X&& x) { return copied(as_view(x), true); }
  /// A parameter, by reference: backward adds to its `grad`, and to nothing if it is frozen. Its value must not change
  /// between here and backward.
  var<T> use(parameter<T>& p) {
    typename var<T>::node_type n;
    n.value = p.value.data();
    n.shape = p.shape;
    n.needs_grad = record_ && p.trainable;
    n.source = &p;
    return push(std::move(n));
  }

  /// A new value of the given shape, its elements unset; it needs a gradient if one of `inputs` does.
  /// Empty inputs are passed over. Throws value_error if an input is on another tape.
  var<T> make(const shape& s, std::initializer_list<var<T>> inputs) {
    return make(s, std::span<const var<T>>(inputs.begin(), inputs.size()));
  }
  var<T> make(const shape& s, std::span<const var<T>> inputs) {
    typename var<T>::node_type n;
    for (const var<T>& v : inputs) {
      if (!v) continue;
      if (v.tape_ != this) detail::fail_value("nn::tape: two operands are on different tapes");
      n.needs_grad = n.needs_grad || v.needs_grad();
    }
    n.shape = s;
    n.value = scratch(s.size());
    return push(std::move(n));
  }
  /// Says what backward does for `output`: f reads output.grad() and adds to the inputs' gradients (of those that need
  /// one). It is not called if no gradient reaches the output, and dropped at once if none can.
  template <std::invocable F>
  void on_backward(var<T> output, F f) {
    if (output.needs_grad()) output.node().backward = std::move(f);
  }

  /// Memory for `count` elements that lives as long as the values do: what an operation saves for its backward.
  T* scratch(index_t count) { return scratch_of<T>(count); }
  template <class U>
  U* scratch_of(index_t count) {
    const std::size_t bytes = static_cast<std::size_t>(
        detail::round_up(std::max<index_t>(count, 1) * index_t{sizeof(U)}, detail::cache_line));
    while (chunk_ < chunks_.size() && chunks_[chunk_].bytes - used_ < bytes) {
      ++chunk_;
      used_ = 0;
    }
    if (chunk_ == chunks_.size()) {
      const std::size_t size = std::max(bytes, std::size_t{1} << 20);
      chunks_.push_back({detail::make_aligned<std::byte>(static_cast<index_t>(size)), size});
    }
    std::byte* p = chunks_[chunk_].data.get() + used_;
    used_ += bytes;
    return reinterpret_cast<U*>(p);
  }

  /// Computes the gradient of `loss`, one number, with respect to all that it was computed from, and adds it to the
  /// parameters' `grad`. Runs once per recording. Cost: about twice that of the forward pass.
  void backward(var<T> loss) {
    if (loss.size() != 1)
      detail::fail_shape("nn::tape::backward: loss has shape ", loss.shape().text(), ", not one element");
    if (!loss.needs_grad()) detail::fail_value("nn::tape::backward: loss depends on nothing that is trainable");
    if (loss.tape_ != this) detail::fail_value("nn::tape::backward: loss is on another tape");
    if (std::exchange(ran_, true)) detail::fail_value("nn::tape::backward: it has run already; clear the tape first");
    *loss.grad_data() = T{1};
    for (std::size_t i = loss.id_ + 1; i-- > 0;) {
      auto& n = nodes_[i];
      if (n.grad && n.backward) n.backward();
    }
  }

 private:
  friend class var<T>;
  struct chunk {
    detail::aligned_ptr<std::byte> data;
    std::size_t bytes;
  };

  var<T> push(typename var<T>::node_type n) {
    n.needs_grad = n.needs_grad && record_;
    nodes_.push_back(std::move(n));
    return {*this, nodes_.size() - 1, epoch_};
  }

  template <class U, int Rank>
  var<T> copied(tensor_view<U, Rank> v, bool needs_grad) {
    detail::check_view("nn::tape", "the value", v);
    typename var<T>::node_type n;
    n.shape = shape(v.extents.data(), Rank);
    n.value = scratch(v.size());
    n.needs_grad = needs_grad;
    T* to = n.value;
    copy(v, v.data, 0, to);
    return push(std::move(n));
  }
  template <class U, int Rank>
  static void copy(const tensor_view<U, Rank>& v, U* from, int d, T*& to) {
    if (v.empty()) return;
    for (index_t i = 0; i < v.extent(d); ++i, from += v.stride(d)) {
      if (d + 1 < Rank)
        copy(v, from, d + 1, to);
      else
        *to++ = static_cast<T>(*from);
    }
  }

  cpu exec_;
  bool record_ = true;
  bool ran_ = false;
  std::uint64_t epoch_ = 0;
  std::deque<typename var<T>::node_type> nodes_;
  std::vector<chunk> chunks_;
  std::size_t chunk_ = 0, used_ = 0;
};

template <real T>
tape<T>& var<T>::on() const {
  node();
  return *tape_;
}

template <real T>
typename var<T>::node_type& var<T>::node() const {
  if (!tape_ || epoch_ != tape_->epoch_) detail::fail_value("nn::var: its tape has been cleared, or it has none");
  return tape_->nodes_[id_];
}

template <real T>
T* var<T>::fresh_grad() const {
  node_type& n = node();
  if (n.grad || n.source) return nullptr;
  return n.grad = tape_->scratch(size());
}

template <real T>
T* var<T>::grad_data() const {
  node_type& n = node();
  if (n.grad) return n.grad;
  if (parameter<T>* p = n.source) {
    if (p->grad.size() != p->size())
      p->grad = vector<T>({p->size()});
    else if (!p->has_grad)
      std::fill(p->grad.begin(), p->grad.end(), T{});
    p->has_grad = true;
    n.grad = p->grad.data();
  } else {
    n.grad = tape_->scratch(size());
    std::fill_n(n.grad, size(), T{});
  }
  return n.grad;
}

}  // namespace MLKIT_NAMESPACE::nn
