// Parameters: named, owning tensors with a gradient, kept in a store that layers point into.
#pragma once

#include <concepts>
#include <deque>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "../core/random.hpp"
#include "../core/tensor.hpp"
#include "shape.hpp"

namespace MLKIT_NAMESPACE::nn {

/// What the tape computes in: float, or double so that gradients can be checked.
template <class T>
concept real = std::same_as<T, float> || std::same_as<T, double>;

/// A named tensor that an optimizer may change. `grad` has no memory until the first gradient arrives, so that a frozen
/// parameter costs none.
template <real T>
struct parameter {
  std::string name;
  nn::shape shape;
  vector<T> value;        ///< shape.size() elements, row-major
  vector<T> grad;         ///< empty, or as many
  bool trainable = true;  ///< false: no gradient is computed for it, ever
  bool has_grad = false;  ///< whether a backward pass has reached it since the last zero_grad()

  index_t size() const noexcept { return shape.size(); }
  /// The value seen as a matrix [product of the leading extents, last extent].
  matrix_view<T> matrix() noexcept { return {value.data(), {shape.rows(), shape.columns()}}; }
  matrix_view<const T> matrix() const noexcept { return {value.data(), {shape.rows(), shape.columns()}}; }
};

// How a new parameter starts: a functor of a random stream and an element's index. ------------------------------------

/// All 0.
struct zeros {
  double operator()(random_stream, index_t) const noexcept { return 0; }
};
/// All 1.
struct ones {
  double operator()(random_stream, index_t) const noexcept { return 1; }
};
/// Uniform in [-bound, bound).
struct uniform {
  double bound;
  double operator()(random_stream stream, index_t i) const noexcept {
    return bound * (2.0 * stream.uniform(static_cast<std::uint64_t>(i)) - 1.0);
  }
};
/// Normal with mean 0.
struct normal {
  double stddev;
  double operator()(random_stream stream, index_t i) const noexcept {
    return stddev * stream.normal(static_cast<std::uint64_t>(i));
  }
};

/// Owns parameters. Their addresses do not change while the store lives, also when it is moved.
///
/// A parameter starts from the random stream (seed, hash of its name), so that its first value depends on neither the
/// order in which layers are made nor on what else is in the model.
template <real T>
class parameters {
 public:
  explicit parameters(std::uint64_t seed = 0) : seed_(seed) {}
  parameters(parameters&&) noexcept = default;
  parameters& operator=(parameters&&) noexcept = default;

  /// Adds a parameter. Throws value_error if the name is taken.
  template <class Init>
    requires std::invocable<const Init&, random_stream, index_t> parameter<T>
  &add(std::string name, const shape& extents, const Init& init) {
    if (by_name_.contains(name)) detail::fail_value("nn::parameters::add: the name ", name, " is taken");
    const random_stream stream{seed_, stream_of(name)};
    parameter<T>& p = all_.emplace_back();
    by_name_.emplace(name, &p);
    p.name = std::move(name);
    p.shape = extents;
    p.value = vector<T>({extents.size()}, uninitialized);
    for (index_t i = 0; i < p.size(); ++i) p.value(i) = static_cast<T>(init(stream, i));
    return p;
  }

  /// The parameter of that name. Throws value_error if there is none.
  parameter<T>& at(std::string_view name) { return *find(name); }
  const parameter<T>& at(std::string_view name) const { return *find(name); }
  bool contains(std::string_view name) const { return by_name_.find(name) != by_name_.end(); }

  auto begin() noexcept { return all_.begin(); }
  auto end() noexcept { return all_.end(); }
  auto begin() const noexcept { return all_.begin(); }
  auto end() const noexcept { return all_.end(); }

  /// How many parameters, and how many numbers in them.
  index_t count() const noexcept { return static_cast<index_t>(all_.size()); }
  index_t elements() const noexcept {
    index_t n = 0;
    for (const parameter<T>& p : all_) n += p.size();
    return n;
  }

  /// Marks every parameter as frozen, or as trainable again.
  void freeze(bool frozen = true) noexcept {
    for (parameter<T>& p : all_) p.trainable = !frozen;
  }

  /// Copies values by name. Throws before anything is written if names or shapes differ.
  void copy_values(const parameters& from) {
    detail::check_extent("nn::parameters::copy_values", "the source", "parameters", from.count(), "the target",
                         count());
    for (const parameter<T>& p : all_)
      if (const parameter<T>& q = from.at(p.name); q.shape != p.shape)
        detail::fail_shape("nn::parameters::copy_values: ", p.name, " has shape ", p.shape.text(),
                           ", but the source has ", q.shape.text());
    for (parameter<T>& p : all_) std::copy_n(from.at(p.name).value.data(), p.size(), p.value.data());
  }

 private:
  parameter<T>* find(std::string_view name) const {
    const auto it = by_name_.find(name);
    if (it == by_name_.end()) detail::fail_value("nn::parameters::at: no parameter is named ", name);
    return it->second;
  }
  // FNV-1a, 64 bits.
  static std::uint64_t stream_of(std::string_view name) noexcept {
    std::uint64_t h = 0xcbf29ce484222325u;
    for (const char c : name) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
    return h;
  }

  std::uint64_t seed_;
  std::deque<parameter<T>> all_;
  std::map<std::string, parameter<T>*, std::less<>> by_name_;
};

/// A place in a store: what layers are made in. `scope / "blocks.0" / "up"` names what is added there
/// "blocks.0.up.<name>".
template <real T>
class scope {
 public:
  scope(parameters<T>& store, std::string path = {}) : store_(&store), path_(std::move(path)) {}

  scope operator/(std::string_view name) const { return {*store_, join(name)}; }
  template <class Init>
  parameter<T>& add(std::string_view name, const shape& extents, const Init& init) const {
    return store_->add(join(name), extents, init);
  }
  const std::string& path() const noexcept { return path_; }

 private:
  std::string join(std::string_view name) const {
    return path_.empty() ? std::string(name) : path_ + "." + std::string(name);
  }
  parameters<T>* store_;
  std::string path_;
};

/// The parameters of one or several stores that are trainable now: what an optimizer is given.
template <real T, std::same_as<parameters<T>>... More>
std::vector<parameter<T>*> trainable(parameters<T>& store, More&... more) {
  std::vector<parameter<T>*> found;
  const auto collect = [&](parameters<T>& s) {
    for (parameter<T>& p : s)
      if (p.trainable) found.push_back(&p);
  };
  collect(store);
  (collect(more), ...);
  return found;
}

}  // namespace MLKIT_NAMESPACE::nn
