// Attention, with its maps and edits, and decoding.
#include <mlkit/attention.hpp>

#include "calls.hpp"

namespace attention = mlkit::attention;
using mlkit::bf16;
using mlkit::tensor;

namespace {

template <class T, std::size_t Rank>
tensor<T, static_cast<int>(Rank)> noise_of(const std::array<index_t, Rank>& shape, std::uint64_t stream) {
  const auto from = noise(shape, stream);
  tensor<T, static_cast<int>(Rank)> t(shape);
  std::transform(from.begin(), from.end(), t.begin(), [](float x) { return static_cast<T>(x); });
  return t;
}

}  // namespace

TEMPLATE_TEST_CASE("attention, forward and backward, a batch and one head, and packed", "[threads]", float, bf16) {
  using T = TestType;
  struct shape {
    index_t batch, heads, queries;
  };
  for (const shape& s : {shape{3, 2, 130}, shape{1, 1, 2100}}) {
    const index_t keys = 100, d = 20;
    const auto q = noise_of<T>(std::array{s.batch, s.heads, s.queries, d}, 1), dout = noise_of<T>(q.extents(), 4),
               k = noise_of<T>(std::array{s.batch, index_t{1}, keys, d}, 2), v = noise_of<T>(k.extents(), 3),
               bias = noise_of<T>(std::array{index_t{1}, s.heads, index_t{1}, keys}, 5);
    const auto logits = noise_of<T>(std::array{s.heads}, 6);
    check([&](const cpu& exec) {
      const attention::scores pipeline{attention::bias{bias}, attention::causal{attention::align::top_left},
                                       attention::sinks{logits}, attention::dropout{.p = 0.1}};
      tensor<T, 4> out(q.extents()), dq(q.extents()), dk(k.extents()), dv(v.extents()), db(bias.extents());
      tensor<float, 3> lse({s.batch, s.heads, s.queries});
      mlkit::vector<T> ds({s.heads});
      attention::forward(exec, q, k, v, pipeline, out, lse);
      attention::gradients gradients{dq, dk, dv, db};
      gradients.dsinks = ds.view();
      attention::backward(exec, q, k, v, pipeline, out, lse, dout, gradients);
      outputs all;
      for (const auto* t : {&out, &dq, &dk, &dv, &db}) append(all, *t);
      append(all, lse), append(all, ds);
      return all;
    });
  }
  const auto q = noise_of<T>(std::array<index_t, 3>{500, 2, 20}, 1),
             k = noise_of<T>(std::array<index_t, 3>{500, 1, 20}, 2);
  const std::vector<std::int32_t> starts{0, 300, 301, 500};
  check([&](const cpu& exec) {
    tensor<T, 3> out(q.extents()), dq(q.extents()), dk(k.extents()), dv(k.extents());
    matrix<float> lse({2, 500});
    const attention::sequences packed(starts);
    const attention::scores<> pipeline;
    attention::forward(exec, q, k, k, packed, pipeline, out, lse);
    attention::backward(exec, q, k, k, packed, pipeline, out, lse, q, dq, dk, dv);
    outputs all;
    for (const auto* t : {&out, &dq, &dk, &dv}) append(all, *t);
    return all;
  });
}

TEST_CASE("maps of attention, and edits with a blend", "[threads]") {
  const index_t heads = 4, height = 25, width = 20, keys = 77, d = 16;
  const auto q = noise(std::array{index_t{2}, heads, height * width, d}, 1),
             k = noise(std::array{index_t{2}, heads, keys, d}, 2), v = noise(k.extents(), 3);
  const attention::scores pipeline{attention::scale{4}};
  const std::vector<float> louder(77, 2.0f);
  const attention::edit_plan plan({.steps = 4}, {{.words = attention::align_same(keys), .equaliser = louder}});
  check([&](const cpu& exec) {
    tensor<float, 4> out(q.extents());
    tensor<float, 3> map({2, height * width, keys});
    attention::local_blend blend({.height = height, .width = width}, keys, {{2}, {2, 3}});
    outputs all;
    attention::forward(exec, q, k, v, pipeline, out, attention::averaged_map{map});
    append(all, out), append(all, map);
    for (int layer = 0; layer < 2; ++layer) attention::edited_cross(exec, q, k, v, pipeline, plan, 0, out, blend);
    append(all, out);
    const auto sums = blend.sums();
    all.insert(all.end(), sums.data, sums.data + sums.size());
    return all;
  });
}

TEST_CASE("rotary embedding, appending to caches, decoding, merging", "[threads]") {
  const index_t batch = 2, kv = 2, capacity = 1300, d = 40;
  const auto x = noise(std::array{batch, kv, index_t{1200}, d}, 1);
  const auto q = noise(std::array{batch, 2 * kv, d}, 2);
  const attention::rotary_table<float> table({.positions = 1200, .d = d});
  check([&](const cpu& exec) {
    tensor<float, 4> k({batch, kv, capacity, d}), v({batch, kv, capacity, d}), turned(x.extents());
    tensor<float, 3> out({batch, 2 * kv, d});
    matrix<float> lse({batch, 2 * kv});
    std::vector<int> lengths{0, 100};
    const attention::contiguous cache(k, v, lengths);
    attention::rotate(exec, x, table, turned);
    attention::append(exec, turned, x, cache);
    attention::decode(exec, q, cache, out, {}, lse);
    tensor<float, 4> merged({batch, 2 * kv, 1, d});
    tensor<float, 3> merged_lse({batch, 2 * kv, 1});
    attention::merge(exec, merged, merged_lse, mlkit::tensor_view<float, 4>(out.data(), merged.extents()),
                     mlkit::tensor_view<float, 3>(lse.data(), merged_lse.extents()));
    outputs all;
    for (const auto* t : {&k, &v, &merged}) append(all, *t);
    append(all, merged_lse);
    return all;
  });
}

TEST_CASE("appending to caches in pages and in int8, and decoding", "[threads]") {
  const index_t batch = 2, kv = 2, page = 52, of_sequence = 25, pages = batch * of_sequence, d = 40;
  const auto x = noise(std::array{batch, kv, index_t{1200}, d}, 1);
  const auto q = noise(std::array{batch, 2 * kv, d}, 2);
  std::vector<std::int32_t> numbers(static_cast<std::size_t>(pages));
  for (std::size_t i = 0; i < numbers.size(); ++i)
    numbers[i] = static_cast<std::int32_t>((i * 37 + 5) % numbers.size());
  const mlkit::matrix_view<const std::int32_t> table(numbers.data(), {batch, of_sequence});
  check([&](const cpu& exec) {
    tensor<bf16, 4> k({pages, page, kv, d}), v(k.extents());
    std::vector<std::int8_t> k_codes(static_cast<std::size_t>(k.size())), v_codes(k_codes.size());
    const mlkit::extents_t<4> shape{batch, kv, page * of_sequence, d};
    const mlkit::tensor_view<std::int8_t, 4> k_int8(k_codes.data(), shape), v_int8(v_codes.data(), shape);
    tensor<float, 3> k_scales({batch, kv, page * of_sequence}), v_scales(k_scales.extents()), out({batch, 2 * kv, d});
    outputs all;
    const auto fill_and_decode = [&](const auto& cache) {
      attention::append(exec, x, x, cache);
      attention::decode(exec, q, cache, out);
      append(all, out);
    };
    std::vector<int> lengths{0, 100}, of_int8 = lengths;
    fill_and_decode(attention::paged(k, v, table, lengths));
    fill_and_decode(attention::contiguous(k_int8, v_int8, of_int8, k_scales, v_scales));
    append(all, k), append(all, v), append(all, k_codes), append(all, v_codes), append(all, k_scales),
        append(all, v_scales);
    return all;
  });
}
