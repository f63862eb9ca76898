// What must not change a result: the order of keys and of queries, what else is in a batch, how a cache is cut up, and
// the number of threads.
#include <set>

#include "reference.hpp"

namespace attention = mlkit::attention;
using attention::align;
using namespace attention_reference;

namespace {

constexpr index_t far = attention::window::unlimited;

// One pipeline for all, so that it is compiled once for each dtype.
template <class T>
struct stages {
  mlkit::tensor<float, 4> bias;
  mlkit::vector<T> sinks;
  attention::window window{far, far, align::bottom_right};
  double p = 0;
  stages(const mlkit::extents_t<4>& bias_shape, index_t heads) : bias(bias_shape), sinks({heads}) {
    fill<float>(bias, 6), fill<T>(sinks, 7);
  }
  auto pipeline() const {
    return attention::scores{attention::scale{0.3},   attention::softcap{3},
                             attention::bias{bias},   window,
                             attention::sinks{sinks}, attention::dropout{.p = p, .seed = 4}};
  }
};

// Of tensors and views that are contiguous.
bool same(const auto& a, const auto& b) {
  const auto x = mlkit::as_view(a);
  const auto y = mlkit::as_view(b);
  return x.extents == y.extents &&
         std::memcmp(x.data, y.data, static_cast<std::size_t>(x.size()) * sizeof(*x.data)) == 0;
}

// Rows of the last but one dimension in another order: row i becomes row order[i].
template <class T>
mlkit::tensor<T, 4> permuted(const mlkit::tensor<T, 4>& t, const std::vector<index_t>& order) {
  mlkit::tensor<T, 4> out(t.extents());
  for (index_t b = 0; b < t.extent(0); ++b)
    for (index_t h = 0; h < t.extent(1); ++h)
      for (index_t i = 0; i < t.extent(2); ++i)
        for (index_t c = 0; c < t.extent(3); ++c) out(b, h, i, c) = t(b, h, order[static_cast<std::size_t>(i)], c);
  return out;
}
std::vector<index_t> shuffled(index_t n) {
  std::vector<index_t> order(static_cast<std::size_t>(n));
  for (index_t i = 0; i < n; ++i) order[static_cast<std::size_t>(i)] = (i * 31 + 5) % n;  // 31 divides no n here
  REQUIRE(std::set<index_t>(order.begin(), order.end()).size() == order.size());
  return order;
}

double difference(const auto& a, const auto& b) {
  double most = 0;
  for (index_t i = 0; i < a.size(); ++i)
    most = std::max(most, std::fabs(static_cast<double>(a.data()[i]) - static_cast<double>(b.data()[i])));
  return most;
}

// Item b of a batch.
auto item(auto& t, index_t b) {
  auto v = mlkit::as_view(t);
  v.data += b * v.strides[0];
  v.extents[0] = 1;
  return v;
}

}  // namespace

TEMPLATE_TEST_CASE("another order of queries changes no bits, another order of keys only the rounding",
                   "[attention][properties]", float, mlkit::bf16) {
  using T = TestType;
  const index_t queries = 300, keys = 270;
  problem<T> p(1, 2, 1, queries, keys, 9, 7), moved(1, 2, 1, queries, keys, 9, 7);
  stages<T> s({1, 2, queries, keys}, 2), other({1, 2, queries, keys}, 2);
  p.run(s.pipeline());
  const auto bound = [&](const auto& t, double of) {
    double size = 0;
    for (index_t i = 0; i < t.size(); ++i) size = std::max(size, std::fabs(static_cast<double>(t.data()[i])));
    return of * size;
  };
  const double rounding = std::is_same_v<T, float> ? 2e-6 : 2e-2;
  {
    const auto order = shuffled(queries);
    moved.q = permuted(p.q, order), moved.dout = permuted(p.dout, order), other.bias = permuted(s.bias, order);
    for (index_t h = 0; h < 2; ++h)
      for (index_t i = 0; i < queries; ++i) moved.dlse(0, h, i) = p.dlse(0, h, order[static_cast<std::size_t>(i)]);
    moved.run(other.pipeline());
    CHECK(same(moved.out, permuted(p.out, order)));
    CHECK(same(moved.dq, permuted(p.dq, order)));
    CHECK(same(moved.dbias, permuted(p.dbias, order)));
    CHECK(difference(moved.dk, p.dk) < bound(p.dk, rounding));
    CHECK(difference(moved.dv, p.dv) < bound(p.dv, rounding));
    CHECK(difference(moved.dsinks, p.dsinks) < bound(p.dsinks, rounding));
  }
  {
    const auto order = shuffled(keys);
    moved.q = p.q.clone(), moved.dout = p.dout.clone(), moved.dlse = p.dlse.clone();
    moved.k = permuted(p.k, order), moved.v = permuted(p.v, order);
    for (index_t h = 0; h < 2; ++h)
      for (index_t i = 0; i < queries; ++i)
        for (index_t j = 0; j < keys; ++j) other.bias(0, h, i, j) = s.bias(0, h, i, order[static_cast<std::size_t>(j)]);
    moved.run(other.pipeline());
    CHECK(difference(moved.out, p.out) < bound(p.out, rounding));
    CHECK(difference(moved.lse, p.lse) < bound(p.lse, 1e-6));
    CHECK(difference(moved.dq, p.dq) < bound(p.dq, rounding));
    CHECK(difference(moved.dk, permuted(p.dk, order)) < bound(p.dk, rounding));
    CHECK(difference(moved.dv, permuted(p.dv, order)) < bound(p.dv, rounding));
  }
}

TEMPLATE_TEST_CASE("an item gets the same bits alone and in a batch, forward and backward", "[attention][properties]",
                   float, mlkit::bf16) {
  using T = TestType;
  const index_t queries = 1100, keys = 150;
  problem<T> p(3, 4, 2, queries, keys, 9, 7);
  stages<T> s({3, 4, 1, keys}, 4);
  s.window = {far, 20, align::bottom_right};
  p.run(s.pipeline(), mlkit::cpu{.threads = 2});
  for (const int threads : {1, 5}) {
    problem<T> one(1, 4, 2, queries, keys, 9, 7);
    mlkit::tensor<T, 4> dbias({1, 4, 1, keys});
    const mlkit::cpu exec{.threads = threads};
    stages<T> own({1, 4, 1, keys}, 4);
    own.window = s.window;
    std::copy_n(&s.bias(1, 0, 0, 0), own.bias.size(), own.bias.data());
    attention::forward(exec, item(p.q, 1), item(p.k, 1), item(p.v, 1), own.pipeline(), one.out, one.lse);
    attention::backward(exec, item(p.q, 1), item(p.k, 1), item(p.v, 1), own.pipeline(), one.out, one.lse,
                        item(p.dout, 1), attention::gradients(one.dq, one.dk, one.dv, dbias), item(p.dlse, 1));
    CHECK(same(one.out, item(p.out, 1)));
    CHECK(same(one.lse, item(p.lse, 1)));
    CHECK(same(one.dq, item(p.dq, 1)));
    CHECK(same(one.dk, item(p.dk, 1)));
    CHECK(same(one.dv, item(p.dv, 1)));
    CHECK(same(dbias, item(p.dbias, 1)));
  }
}

TEST_CASE("a sequence gets the same bits alone and packed with others", "[attention][packed][properties]") {
  const std::vector<std::int32_t> queries{0, 70, 670, 671}, keys{0, 5, 555, 900};
  mlkit::tensor<float, 3> q({671, 2, 9}), k({900, 1, 9}), v({900, 1, 7}), out({671, 2, 7}), dout({671, 2, 7}),
      dq({671, 2, 9}), dk({900, 1, 9}), dv({900, 1, 7});
  mlkit::matrix<float> lse({2, 671});
  fill<float>(q, 1), fill<float>(k, 2), fill<float>(v, 3), fill<float>(dout, 4);
  const attention::scores pipeline{attention::scale{0.3}, attention::window{50, 3, align::bottom_right}};
  const auto run = [&](const attention::sequences& of, const auto& first, const auto& count) {
    const auto rows = [](auto& t, index_t from, index_t n) {
      auto w = t.view();
      w.data += from * w.strides[0];
      w.extents[0] = n;
      return w;
    };
    const index_t i = first[0], n = count[0], j = first[1], m = count[1];
    const mlkit::matrix_view<float> l(lse.data() + i, {2, n}, {671, 1});
    attention::forward(mlkit::cpu{.threads = 3}, rows(q, i, n), rows(k, j, m), rows(v, j, m), of, pipeline,
                       rows(out, i, n), l);
    attention::backward(mlkit::cpu{.threads = 3}, rows(q, i, n), rows(k, j, m), rows(v, j, m), of, pipeline,
                        rows(out, i, n), l, rows(dout, i, n), rows(dq, i, n), rows(dk, j, m), rows(dv, j, m));
  };
  run(attention::sequences(queries, keys), std::array<index_t, 2>{0, 0}, std::array<index_t, 2>{671, 900});
  const auto out_all = out.clone(), dq_all = dq.clone(), dk_all = dk.clone(), dv_all = dv.clone();
  const auto lse_all = lse.clone();
  for (auto* t : {&out, &dq, &dk, &dv}) std::fill(t->begin(), t->end(), std::nanf(""));
  std::fill(lse.begin(), lse.end(), std::nanf(""));
  for (std::size_t b = 0; b < 3; ++b) {
    const std::vector<std::int32_t> n{0, queries[b + 1] - queries[b]}, m{0, keys[b + 1] - keys[b]};
    run(attention::sequences(n, m), std::array<index_t, 2>{queries[b], keys[b]}, std::array<index_t, 2>{n[1], m[1]});
  }
  CHECK((same(out, out_all) && same(lse, lse_all) && same(dq, dq_all) && same(dk, dk_all) && same(dv, dv_all)));
}

TEST_CASE("decode over parts of a cache merges to decode over all, and no sequence changes another's bits",
          "[attention][decode][properties]") {
  constexpr index_t batch = 3, heads = 6, kv = 2, d = 20, d_v = 9, capacity = 2500;
  mlkit::tensor<double, 3> q({batch, heads, d}), whole({batch, heads, d_v}), part({batch, heads, d_v});
  mlkit::tensor<double, 4> k({batch, kv, capacity, d}), v({batch, kv, capacity, d_v});
  mlkit::matrix<double> whole_lse({batch, heads}), part_lse({batch, heads});
  fill<double>(q, 1), fill<double>(k, 2), fill<double>(v, 3);
  const std::vector<int> lengths{2500, 3, 1700};
  attention::decode(mlkit::cpu{}, q, attention::contiguous(k, v, lengths), whole, {}, whole_lse);

  mlkit::tensor<double, 4> merged({batch, heads, 1, d_v});
  mlkit::tensor<double, 3> merged_lse({batch, heads, 1});
  std::fill(merged_lse.begin(), merged_lse.end(), -inf);
  const auto from = [](auto& t, index_t first) {
    auto w = t.view();
    w.data += first * w.strides[2];
    w.extents[2] -= first;
    return w;
  };
  for (const auto& [first, last] :
       std::vector<std::array<int, 2>>{{1700, 2500}, {0, 1}, {1, 1}, {1, 700}, {700, 1700}}) {
    std::vector<int> here;
    for (const int n : lengths) here.push_back(std::clamp(n - first, 0, last - first));
    attention::decode(mlkit::cpu{}, q, attention::contiguous(from(k, first), from(v, first), here), part, {}, part_lse);
    attention::merge(mlkit::cpu{}, merged, merged_lse, mlkit::tensor_view<double, 4>(part.data(), merged.extents()),
                     mlkit::tensor_view<double, 3>(part_lse.data(), merged_lse.extents()));
  }
  CHECK(difference(merged, whole) < 1e-14);
  CHECK(difference(merged_lse, whole_lse) < 1e-13);

  for (index_t b = 0; b < batch; ++b) {
    const std::vector<int> n{lengths[static_cast<std::size_t>(b)]};
    mlkit::tensor<double, 3> one({1, heads, d_v});
    attention::decode(mlkit::cpu{}, item(q, b), attention::contiguous(item(k, b), item(v, b), n), one);
    CHECK(same(one, item(whole, b)));
  }
}

namespace {

// Everything that call(exec) returns has the same bits on 1, 2, 3 and 7 threads.
template <class Call>
void check_threads(const char* what, const Call& call) {
  INFO(what);
  const auto want = call(mlkit::cpu{.threads = 1});
  REQUIRE(!want.empty());
  for (const int threads : {2, 3, 7}) {
    INFO(threads << " threads");
    CHECK(call(mlkit::cpu{.threads = threads}) == want);
  }
}
void append(std::vector<double>& all, const auto& t) { all.insert(all.end(), t.begin(), t.end()); }

}  // namespace

TEMPLATE_TEST_CASE("the same bits for any number of threads, forward and backward with every gradient",
                   "[attention][properties]", float, mlkit::bf16) {
  using T = TestType;
  // A batch that no number of threads divides, and one head; biases of one row, of a row for each query, and of one
  // element for each score.
  for (const auto& [batch, heads, queries, rows, shared] : std::vector<std::array<index_t, 5>>{
           {3, 4, 150, 150, 1}, {3, 4, 150, 1, 1}, {1, 1, 2200, 2200, 1}, {3, 4, 150, 150, 0}}) {
    problem<T> p(batch, heads, heads == 1 ? 1 : 2, queries, 250, 9, 7);
    stages<T> s({shared ? 1 : batch, heads, rows, 250}, heads);
    s.window = {60, 10, align::bottom_right};
    s.p = 0.2;
    check_threads("forward and backward", [&](const mlkit::cpu& exec) {
      p.run(s.pipeline(), exec);
      std::vector<double> all;
      for (const auto& part : p.written().of) all.insert(all.end(), part.begin(), part.end());
      for (double& x : all) x = std::isinf(x) ? 1e300 : x;
      return all;
    });
  }
}

TEST_CASE("the same bits for any number of threads: packed sequences, rotation, merging", "[attention][properties]") {
  const std::vector<std::int32_t> starts{0, 250, 251, 900};
  mlkit::tensor<float, 3> q({900, 2, 9}), k({900, 1, 9}), v({900, 1, 7}), dout({900, 2, 7});
  fill<float>(q, 1), fill<float>(k, 2), fill<float>(v, 3), fill<float>(dout, 4);
  check_threads("packed", [&](const mlkit::cpu& exec) {
    mlkit::tensor<float, 3> out({900, 2, 7}), dq(q.extents()), dk(k.extents()), dv(v.extents());
    mlkit::matrix<float> lse({2, 900});
    const attention::sequences packed(starts);
    const attention::scores pipeline{attention::scale{0.3}, attention::window{50, 3, align::bottom_right}};
    attention::forward(exec, q, k, v, packed, pipeline, out, lse);
    attention::backward(exec, q, k, v, packed, pipeline, out, lse, dout, dq, dk, dv);
    std::vector<double> all;
    for (const auto* t : {&out, &dq, &dk, &dv}) append(all, *t);
    append(all, lse);
    return all;
  });

  const attention::rotary_table<float> table({.positions = 2000, .d = 64});
  mlkit::tensor<float, 4> x({2, 4, 1900, 64});
  fill<float>(x, 1);
  check_threads("rotate", [&](const mlkit::cpu& exec) {
    mlkit::tensor<float, 4> y(x.extents());
    attention::rotate(exec, x, table, y, {.pairs = attention::pairing::adjacent, .first = 100});
    return std::vector<float>(y.begin(), y.end());
  });

  mlkit::tensor<float, 4> first({2, 3, 50, 7}), second({2, 3, 50, 7});
  mlkit::tensor<float, 3> first_lse({2, 3, 50}), second_lse({2, 3, 50});
  fill<float>(first, 1), fill<float>(second, 2), fill<float>(first_lse, 3), fill<float>(second_lse, 4);
  check_threads("merge", [&](const mlkit::cpu& exec) {
    auto out = first.clone();
    auto lse = first_lse.clone();
    attention::merge(exec, out, lse, second, second_lse);
    std::vector<double> all;
    append(all, out), append(all, lse);
    return all;
  });
}

TEMPLATE_TEST_CASE("the same bits for any number of threads: decode and append", "[attention][decode][properties]",
                   float, std::int8_t) {
  using T = TestType;
  constexpr index_t batch = 3, heads = 8, kv = 4, d = 64, pages = 150, page = 48, table_width = 50;
  mlkit::tensor<float, 3> q({batch, heads, d});
  mlkit::tensor<float, 4> more({batch, kv, 700, d});
  fill<float>(q, 1), fill<float>(more, 2);
  std::vector<std::int32_t> numbers(pages);
  for (int i = 0; i < pages; ++i) numbers[static_cast<std::size_t>(i)] = (i * 37 + 5) % pages;
  const mlkit::matrix_view<const std::int32_t> table(numbers.data(), {batch, table_width});
  check_threads("append and decode", [&](const mlkit::cpu& exec) {
    std::vector<T> k(pages * page * kv * d), v(k.size());
    mlkit::tensor<float, 3> k_scales({pages, page, kv}), v_scales({pages, page, kv}), out({batch, heads, d});
    mlkit::matrix<float> lse({batch, heads});
    std::vector<int> lengths{0, 1000, 60};
    const mlkit::extents_t<4> shape{pages, page, kv, d};
    const auto cache = [&] {
      const mlkit::tensor_view<T, 4> ks(k.data(), shape), vs(v.data(), shape);
      if constexpr (std::is_same_v<T, std::int8_t>)
        return attention::paged(ks, vs, table, lengths, k_scales, v_scales);
      else
        return attention::paged(ks, vs, table, lengths);
    }();
    attention::append(exec, more, more, cache);
    attention::append(exec, more, more, cache);
    attention::decode(exec, q, cache, out, {.softcap = 5}, lse);
    std::vector<double> all;
    append(all, k), append(all, v), append(all, k_scales), append(all, v_scales), append(all, out), append(all, lse);
    return all;
  });
}

namespace {

// A pool of the user's own that counts what it is given, and does it.
struct counting_pool {
  int most = 0;
  static int size() { return 7; }
  template <class F>
  void run(int n, F&& f) {
    most = std::max(most, n);
    for (int i = 0; i < n; ++i) f(i);
  }
};

}  // namespace

TEST_CASE("one head of one sequence is spread over threads", "[attention][properties]") {
  counting_pool forward, backward, decode;
  problem<float> p(1, 1, 1, 7200, 70, 9, 7);
  const stages<float> s({1, 1, 1, 70}, 1);
  attention::forward(mlkit::cpu{.pool = forward}, p.q, p.k, p.v, s.pipeline(), p.out, p.lse);
  CHECK(forward.most == 7);
  attention::backward(mlkit::cpu{.pool = backward}, p.q, p.k, p.v, s.pipeline(), p.out, p.lse, p.dout,
                      attention::gradients{p.dq, p.dk, p.dv});
  CHECK(backward.most == 7);
  mlkit::tensor<float, 3> q({1, 1, 64}), out({1, 1, 64});
  mlkit::tensor<float, 4> k({1, 1, 8000, 64});
  const std::vector<int> lengths{8000};
  attention::decode(mlkit::cpu{.pool = decode}, q, attention::contiguous(k, k, lengths), out);
  CHECK(decode.most == 7);
}

TEST_CASE("scratch memory depends on neither keys in forward nor queries in backward", "[attention][properties]") {
  const mlkit::cpu exec{.threads = 1};
  const auto peak = [&](bool backward, index_t queries, index_t keys) {
    problem<float> p(1, 1, 1, queries, keys, 9, 7);
    const stages<float> s({1, 1, 1, 1}, 1);
    attention::forward(exec, p.q, p.k, p.v, s.pipeline(), p.out, p.lse);
    mlkit::reset_workspace_peak();
    if (backward)
      attention::backward(exec, p.q, p.k, p.v, s.pipeline(), p.out, p.lse, p.dout,
                          attention::gradients{p.dq, p.dk, p.dv});
    else
      attention::forward(exec, p.q, p.k, p.v, s.pipeline(), p.out, p.lse);
    return mlkit::workspace_peak_bytes();
  };
  CHECK(peak(false, 64, 1024) == peak(false, 64, 32768));
  CHECK(peak(false, 1024, 64) == peak(false, 8192, 64));
  CHECK(peak(true, 2048, 64) == peak(true, 16384, 64));
  // A float for each element of dk and dv and their padding, twice where queries are cut into parts.
  CHECK(peak(true, 2048, 32768) - peak(true, 2048, 1024) <= 2 * (32768 - 1024 + 24) * (16 + 16) * 4);
}
