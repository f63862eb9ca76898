// Group normalisation: over the positions of a few channels of one image.
#pragma once

#include "ops.hpp"

namespace MLKIT_NAMESPACE::nn {

/// (x - mean) / sqrt(var + epsilon) * gain[channel] + bias[channel], with mean and (biased) var over the elements of
/// one group of channels of one sample. x [n, channels, ...] with any extents behind the channels, or none; the
/// channels fall into `groups` runs of equal length. gain, bias [channels], each may be empty. With one group it is a
/// layer normalisation of the whole sample, with a group for each channel an instance normalisation. Throws shape_error
/// if `groups` does not divide the channels. Wu, He: "Group normalization", 2018; torch.nn.GroupNorm.
template <real T>
var<T> group_norm(var<T> x, index_t groups, var<T> gain = {}, var<T> bias = {}, double epsilon = 1e-5) {
  constexpr std::string_view name = "nn::group_norm";
  const shape& s = x.shape();
  if (s.rank() < 2) detail::fail_shape(name, ": x has shape ", s.text(), ", but must be [n, channels, ...]");
  const index_t n = s[0], channels = s[1], positions = detail::product_of(s, 2, s.rank());
  if (groups < 1) detail::fail_value(name, ": groups = ", groups, " is not positive");
  if (channels == 0 || positions == 0)
    detail::fail_shape(name, ": x has shape ", s.text(), ", without elements in a group");
  if (channels % groups)
    detail::fail_shape(name, ": ", groups, " groups do not divide the ", channels, " channels of x");
  if (!(epsilon >= 0)) detail::fail_value(name, ": epsilon = ", epsilon, " is negative");
  if (gain) detail::check_extent(name, "gain", "elements", gain.size(), "x", channels);
  if (bias) detail::check_extent(name, "bias", "elements", bias.size(), "x", channels);

  tape<T>& t = x.on();
  const var<T> y = t.make(s, {x, gain, bias});
  const index_t each = channels / groups, rows = n * groups, columns = each * positions;
  T* kept = t.scratch(rows * 2);  // mean and 1 / sqrt(var + epsilon) of each group
  const T *px = x.data(), *pg = gain ? gain.data() : nullptr, *pb = bias ? bias.data() : nullptr;
  const auto of_group = [=](const T* p, index_t row) { return p ? p + row % groups * each : nullptr; };
  const auto forward = MLKIT_SELECT_WITHOUT_BF16(normalise_group<T>);
  detail::for_rows(t.exec(), rows, columns, [=, py = y.data()](index_t r) {
    forward(each, positions, px + r * columns, of_group(pg, r), of_group(pb, r), static_cast<T>(epsilon),
            py + r * columns, kept + 2 * r);
  });
  t.on_backward(y, [=] {
    const cpu& exec = y.on().exec();
    // Of each channel of each sample, the sums of dy and of dy (x - mean) r: they are all that gain and bias get, and
    // what x's gradient is centred by.
    T *sums = y.on().scratch(2 * n * channels), *products = sums + n * channels;
    T* dx = x.needs_grad() ? x.grad_data() : nullptr;
    const auto backward = MLKIT_SELECT_WITHOUT_BF16(normalise_group_gradient<T>);
    detail::for_rows(exec, rows, columns, [=, dy = y.grad_data()](index_t r) {
      backward(each, positions, px + r * columns, of_group(pg, r), kept + 2 * r, dy + r * columns, sums + r * each,
               products + r * each, dx ? dx + r * columns : nullptr);
    });
    const auto pass = [&](const var<T>& to, const T* from) {
      if (to && to.needs_grad())
        detail::add_column_sums(exec, n, channels, to.grad_data(),
                                [=](index_t r, index_t c) { return from[r * channels + c]; });
    };
    pass(gain, products);
    pass(bias, sums);
  });
  return y;
}

/// A group normalisation with its parameters, "<scope>.weight" and "<scope>.bias", one of each for a channel.
template <real T>
struct group_norm_layer {
  parameter<T>* gain;
  parameter<T>* bias;
  index_t groups;

  group_norm_layer(const scope<T>& in, index_t groups, index_t channels)
      : gain(&in.add("weight", {channels}, ones{})), bias(&in.add("bias", {channels}, zeros{})), groups(groups) {}
  var<T> operator()(var<T> x) const { return group_norm(x, groups, x.on().use(*gain), x.on().use(*bias)); }
};

}  // namespace MLKIT_NAMESPACE::nn
