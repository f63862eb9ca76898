// Attention layers of mlkit, and the same in loops: projections, rotary embedding, heads and the way back through them.
#pragma once

#include <map>
#include <mlkit/lora.hpp>

#include "reference.hpp"

namespace layer_reference {

using namespace attention_reference;
namespace attention = mlkit::attention;
namespace lora = mlkit::lora;
inline constexpr index_t far = attention::window::unlimited;

// What a projection consists of. NF4 has an adapter too.
enum class kind { plain, lora, dora, nf4 };

// Each array that a layer writes, by its name.
using results = std::map<std::string, std::vector<double>>;

template <class Sum>
struct grid {
  index_t rows = 0, cols = 0;
  std::vector<Sum> v;
  grid() = default;
  grid(index_t r, index_t c) : rows(r), cols(c), v(static_cast<std::size_t>(r * c)) {}
  template <class T>
  grid(index_t r, index_t c, const T* from) : grid(r, c) {
    std::transform(from, from + r * c, v.begin(), [](auto e) { return static_cast<Sum>(e); });
  }
  Sum& operator()(index_t i, index_t j) { return v[static_cast<std::size_t>(i * cols + j)]; }
  Sum operator()(index_t i, index_t j) const { return v[static_cast<std::size_t>(i * cols + j)]; }
  template <class Stored>
  grid stored() const {
    grid g = *this;
    for (Sum& x : g.v) x = static_cast<Sum>(static_cast<Stored>(x));
    return g;
  }
  std::vector<double> values() const { return {v.begin(), v.end()}; }
};
template <class Sum>
grid<Sum> transpose(const grid<Sum>& a) {
  grid<Sum> t(a.cols, a.rows);
  for (index_t i = 0; i < a.rows; ++i)
    for (index_t j = 0; j < a.cols; ++j) t(j, i) = a(i, j);
  return t;
}
// c + a b
template <class Sum>
grid<Sum> plus_product(grid<Sum> c, const grid<Sum>& a, const grid<Sum>& b) {
  for (index_t i = 0; i < c.rows; ++i)
    for (index_t j = 0; j < c.cols; ++j)
      for (index_t k = 0; k < a.cols; ++k) c(i, j) += a(i, k) * b(k, j);
  return c;
}
template <class Sum>
grid<Sum> product(const grid<Sum>& a, const grid<Sum>& b) {
  return plus_product(grid<Sum>(a.rows, b.cols), a, b);
}
template <class Sum>
grid<Sum> scaled_columns(grid<Sum> a, const std::vector<double>& by) {
  for (index_t i = 0; i < a.rows; ++i)
    for (index_t j = 0; j < a.cols; ++j) a(i, j) *= static_cast<Sum>(by[static_cast<std::size_t>(j)]);
  return a;
}
template <class Sum>
grid<Sum> times(grid<Sum> a, double by) {
  for (Sum& x : a.v) x *= static_cast<Sum>(by);
  return a;
}

// The numbers of a projection, and where its gradients go.
template <class T>
struct part {
  using A = mlkit::accumulator_t<T>;
  kind is;
  mlkit::matrix<T> w, a, b, da, db;
  mlkit::vector<T> bias, magnitude, dmagnitude;
  lora::nf4_matrix codes;
  std::vector<double> norms;  // ||w + s b a||, constants
  double scale = 0.75;

  part(kind k, index_t in, index_t out, std::uint64_t stream)
      : is(k),
        w({out, in}),
        a({3, in}),
        b({out, 3}),
        da({3, in}),
        db({out, 3}),
        bias({out}),
        magnitude({out}),
        dmagnitude({out}) {
    const float size = 1 / std::sqrt(static_cast<float>(in));
    fill<T>(w, stream, size), fill<T>(a, stream + 1, size), fill<T>(b, stream + 2, 0.5f),
        fill<T>(bias, stream + 3, 0.3f);
    if (is == kind::nf4) {
      codes = lora::quantise_nf4(mlkit::cpu{}, w, {.block = 32});
      lora::dequantise(mlkit::cpu{}, codes, w);
    }
    fill<T>(magnitude, stream + 4, 0.2f);
    for (index_t o = 0; o < out; ++o) {
      double square = 0;
      for (index_t i = 0; i < in; ++i) {
        double x = static_cast<double>(w(o, i));
        for (index_t r = 0; r < 3; ++r) x += scale * static_cast<double>(b(o, r)) * static_cast<double>(a(r, i));
        square += x * x;
      }
      norms.push_back(std::sqrt(square));
      magnitude(o) = static_cast<T>(static_cast<float>(magnitude(o)) + 1.0f);
    }
  }

  template <kind K>
  auto projection() const {
    const lora::adapter_view<T> adapter{a.view(), b.view(), scale};
    if constexpr (K == kind::plain)
      return lora::projection{lora::dense{w, bias}};
    else if constexpr (K == kind::lora)
      return lora::projection{lora::dense{w, bias}, adapter};
    else if constexpr (K == kind::dora)
      return lora::projection{lora::dense{w, bias}, lora::dora{adapter, magnitude}};
    else
      return lora::projection{
          lora::nf4<std::conditional_t<std::is_same_v<T, double>, double, mlkit::bf16>, T>{codes, bias}, adapter};
  }
  template <kind K>
  auto gradients() {
    if constexpr (K == kind::plain)
      return lora::no_gradients{};
    else if constexpr (K == kind::dora)
      return lora::gradients{da, db, dmagnitude};
    else
      return lora::gradients{da, db};
  }
  template <class Record>
  void written(const std::string& name, const Record& record) const {
    if (is == kind::plain) return;
    record(name + ".da", da), record(name + ".db", db);
    if (is == kind::dora) record(name + ".dmagnitude", dmagnitude);
  }

  // In loops; with sums of type Sum, and matrices between two steps rounded to Stored.
  template <class Sum>
  grid<Sum> of(const mlkit::matrix<T>& m) const {
    return {m.extent(0), m.extent(1), m.data()};
  }
  std::vector<double> factors() const {
    std::vector<double> g(norms.size(), 1.0);
    if (is == kind::dora)
      for (std::size_t o = 0; o < g.size(); ++o) g[o] = static_cast<double>(magnitude.data()[o]) / norms[o];
    return g;
  }
  template <class Sum, class Stored>
  grid<Sum> down(const grid<Sum>& x) const {
    return times(product(x, transpose(of<Sum>(a))), scale).template stored<Stored>();
  }
  // Without bias and magnitude.
  template <class Sum, class Stored>
  grid<Sum> unscaled(const grid<Sum>& x) const {
    const grid<Sum> y = product(x, transpose(of<Sum>(w)));
    return is == kind::plain ? y : plus_product(y, down<Sum, Stored>(x), transpose(of<Sum>(b)));
  }
  template <class Sum, class Stored>
  grid<Sum> forward(const grid<Sum>& x) const {
    grid<Sum> y = scaled_columns(unscaled<Sum, Stored>(x), factors());
    for (index_t i = 0; i < y.rows; ++i)
      for (index_t j = 0; j < y.cols; ++j) y(i, j) += static_cast<Sum>(bias(j));
    return y.template stored<Stored>();
  }
  // dx, and the gradients under their names.
  template <class Sum, class Stored>
  grid<Sum> backward(const std::string& name, const grid<Sum>& x, const grid<Sum>& dy, results& r) const {
    const grid<Sum> u = scaled_columns(dy, factors());
    const grid<Sum> dx = product(u, of<Sum>(w));
    if (is == kind::plain) return dx;
    const grid<Sum> g = times(product(u, of<Sum>(b)), scale).template stored<Stored>();
    r[name + ".da"] = product(transpose(g), x).template stored<Stored>().values();
    r[name + ".db"] = product(transpose(u), down<Sum, Stored>(x)).template stored<Stored>().values();
    if (is == kind::dora) {
      const grid<Sum> z = unscaled<Sum, Stored>(x);
      std::vector<double> dm(norms.size());
      for (index_t i = 0; i < z.rows; ++i)
        for (index_t j = 0; j < z.cols; ++j)
          dm[static_cast<std::size_t>(j)] +=
              static_cast<double>(dy(i, j) * z(i, j)) / norms[static_cast<std::size_t>(j)];
      r[name + ".dmagnitude"] = dm;
    }
    return plus_product(dx, g, of<Sum>(a));
  }
};

struct layer_shape {
  index_t batch = 2, queries = 5, keys = 7, heads = 4, kv_heads = 2, d = 6, d_v = 3, columns = 10, context_columns = 8,
          out_columns = 9;
  index_t left = far, right = far;
};

// A layer, of self-attention or of cross, with rotary embedding or without.
template <class T, bool Self, bool Rotary>
struct layer_problem {
  using A = mlkit::accumulator_t<T>;
  static constexpr index_t first_query = 3, first_key = 1;
  layer_shape s;
  part<T> q, k, v, out;
  mlkit::tensor<T, 3> x, context, dy, y, dx, dcontext;
  mlkit::tensor<T, 4> bias, dbias;
  std::vector<int> lengths;
  attention::rotary_table<A> table;
  attention::kept<T> kept;

  layer_problem(const layer_shape& shape, kind for_q, kind for_k, kind for_v, kind for_out)
      : s(Self ? own(shape) : shape),
        q(for_q, s.columns, s.heads * s.d, 100),
        k(for_k, s.context_columns, s.kv_heads * s.d, 200),
        v(for_v, s.context_columns, s.kv_heads * s.d_v, 300),
        out(for_out, s.heads * s.d_v, s.out_columns, 400),
        x({s.batch, s.queries, s.columns}),
        context({s.batch, s.keys, s.context_columns}),
        dy({s.batch, s.queries, s.out_columns}),
        y({s.batch, s.queries, s.out_columns}),
        dx({s.batch, s.queries, s.columns}),
        dcontext({s.batch, s.keys, s.context_columns}),
        bias({1, s.heads, s.queries, s.keys}),
        dbias({1, s.heads, s.queries, s.keys}),
        table({.positions = s.queries + s.keys + 4, .d = s.d >= 4 ? 4 : 2, .base = 100}) {
    fill<T>(x, 1), fill<T>(context, Self ? 1 : 2), fill<T>(dy, 3), fill<T>(bias, 4);
    for (index_t b = 0; b < s.batch; ++b) lengths.push_back(static_cast<int>(b == 1 ? s.keys - s.keys / 3 : s.keys));
  }
  static layer_shape own(layer_shape shape) {
    shape.keys = shape.queries;
    shape.context_columns = shape.columns;
    return shape;
  }

  // One pipeline for all, so that its kernels are compiled once.
  auto pipeline() const {
    return attention::scores{attention::scale{0.4}, attention::bias{bias},
                             attention::window{s.left, s.right, attention::align::bottom_right},
                             attention::key_lengths{lengths}};
  }
  meaning means() const {
    meaning m = masked(0.4, [this](index_t b, index_t, index_t i, index_t j) {
      const index_t level = i + s.keys - s.queries;
      return j >= level - s.left && j <= level + s.right && j < lengths[static_cast<std::size_t>(b)];
    });
    m.score = [this, hidden = m.score](double value, index_t b, index_t h, index_t i, index_t j) {
      return hidden(value, b, h, i, j) + static_cast<double>(bias(0, h, i, j));
    };
    return m;
  }

  template <kind Q, kind K, kind V, kind Out>
  auto layer() const {
    const auto pq = q.template projection<Q>();
    const auto pk = k.template projection<K>();
    const auto pv = v.template projection<V>();
    const auto po = out.template projection<Out>();
    const attention::layer_options options{.heads = s.heads, .kv_heads = s.kv_heads};
    const attention::rotary turned{table, {.first = first_query}, {.first = Self ? first_query : first_key}};
    if constexpr (Self && Rotary)
      return attention::self{pq, pk, pv, po, options, turned};
    else if constexpr (Self)
      return attention::self{pq, pk, pv, po, options};
    else if constexpr (Rotary)
      return attention::cross{pq, pk, pv, po, options, turned};
    else
      return attention::cross{pq, pk, pv, po, options};
  }
  // All that mlkit writes.
  template <kind Q, kind K, kind V, kind Out>
  results run(const mlkit::cpu& exec = {}) {
    const auto of = layer<Q, K, V, Out>();
    const attention::layer_gradients grads{q.template gradients<Q>(), k.template gradients<K>(),
                                           v.template gradients<V>(), out.template gradients<Out>(), dbias};
    if constexpr (Self) {
      of.forward(exec, x, pipeline(), y, kept);
      of.backward(exec, x, pipeline(), kept, dy, grads, dx);
    } else {
      of.forward(exec, x, context, pipeline(), y, kept);
      of.backward(exec, x, context, pipeline(), kept, dy, grads, dx, dcontext);
    }
    results r;
    const auto record = [&](const std::string& name, const auto& t) {
      std::vector<double>& to = r[name];
      for (const auto e : t) to.push_back(static_cast<double>(e));
    };
    record("y", y), record("dx", dx), record("dbias", dbias);
    if (!Self) record("dcontext", dcontext);
    q.written("q", record), k.written("k", record), v.written("v", record), out.written("out", record);
    return r;
  }

  // The same in loops.
  template <class Sum>
  static grid<Sum> tokens(const mlkit::tensor<T, 3>& t) {
    return {t.extent(0) * t.extent(1), t.extent(2), t.data()};
  }
  // [batch tokens, heads d] into [batch, heads, tokens, d], turned as rotary embedding of pairs i, i + 2 does.
  template <class Sum, class Stored>
  static void to_heads(const grid<Sum>& from, mlkit::tensor<Stored, 4>& to, index_t turned, index_t first,
                       double sign) {
    const index_t heads = to.extent(1), n = to.extent(2), d = to.extent(3);
    for (index_t b = 0; b < to.extent(0); ++b)
      for (index_t h = 0; h < heads; ++h)
        for (index_t t = 0; t < n; ++t)
          for (index_t c = 0; c < d; ++c)
            to(b, h, t, c) = static_cast<Stored>(turn([&](index_t e) { return from(b * n + t, h * d + e); }, c, turned,
                                                      static_cast<double>(first + t), sign));
  }
  template <class Sum>
  static grid<Sum> to_tokens(const std::vector<double>& from, index_t batch, index_t heads, index_t n, index_t d,
                             index_t turned, index_t first, double sign) {
    grid<Sum> g(batch * n, heads * d);
    for (index_t b = 0; b < batch; ++b)
      for (index_t h = 0; h < heads; ++h)
        for (index_t t = 0; t < n; ++t)
          for (index_t c = 0; c < d; ++c)
            g(b * n + t, h * d + c) = turn(
                [&](index_t e) {
                  return static_cast<Sum>(from[static_cast<std::size_t>(((b * heads + h) * n + t) * d + e)]);
                },
                c, turned, static_cast<double>(first + t), sign);
    return g;
  }
  template <class At>
  static auto turn(const At& at, index_t c, index_t turned, double position, double sign) -> decltype(at(c)) {
    using Sum = decltype(at(c));
    if (c >= turned) return at(c);
    const index_t half = turned / 2, pair = c % half;
    const double angle =
        sign * position * std::pow(100.0, -2 * static_cast<double>(pair) / static_cast<double>(turned));
    const Sum cosine = static_cast<Sum>(std::cos(angle)), sine = static_cast<Sum>(std::sin(angle));
    return c < half ? at(c) * cosine - at(c + half) * sine : at(c) * cosine + at(c - half) * sine;
  }

  template <class Sum, class Stored>
  results naive() const {
    results r;
    const index_t turned = Rotary ? table.d() : 0, key_start = Self ? first_query : first_key;
    const grid<Sum> xs = tokens<Sum>(x), cs = Self ? xs : tokens<Sum>(context), dys = tokens<Sum>(dy);
    problem<Stored> p(s.batch, s.heads, s.kv_heads, s.queries, s.keys, s.d, s.d_v);
    std::fill(p.dlse.begin(), p.dlse.end(), 0);
    p.dbias = mlkit::tensor<Stored, 4>(bias.extents());
    to_heads(q.template forward<Sum, Stored>(xs), p.q, turned, first_query, 1);
    to_heads(k.template forward<Sum, Stored>(cs), p.k, turned, key_start, 1);
    to_heads(v.template forward<Sum, Stored>(cs), p.v, 0, 0, 1);
    const std::vector<double> attended = p.template naive<Sum, Stored>(means()).of[0];
    const grid<Sum> o = to_tokens<Sum>(attended, s.batch, s.heads, s.queries, s.d_v, 0, 0, 1);
    r["y"] = out.template forward<Sum, Stored>(o).values();
    to_heads(out.template backward<Sum, Stored>("out", o, dys, r), p.dout, 0, 0, 1);
    const result back = p.template naive<Sum, Stored>(means());
    const grid<Sum> dq = to_tokens<Sum>(back.of[2], s.batch, s.heads, s.queries, s.d, turned, first_query, -1),
                    dk = to_tokens<Sum>(back.of[3], s.batch, s.kv_heads, s.keys, s.d, turned, key_start, -1),
                    dv = to_tokens<Sum>(back.of[4], s.batch, s.kv_heads, s.keys, s.d_v, 0, 0, 1);
    r["dbias"] = back.of[6];
    const auto keep = [](const grid<Sum>& g) { return g.template stored<Stored>(); };
    grid<Sum> from_q = keep(q.template backward<Sum, Stored>("q", xs, keep(dq), r));
    const grid<Sum> from_k = keep(k.template backward<Sum, Stored>("k", cs, keep(dk), r)),
                    from_v = keep(v.template backward<Sum, Stored>("v", cs, keep(dv), r));
    grid<Sum> both = from_k;
    for (std::size_t i = 0; i < both.v.size(); ++i) both.v[i] += from_v.v[i];
    if (Self) {
      for (std::size_t i = 0; i < both.v.size(); ++i) from_q.v[i] += both.v[i];
    } else {
      r["dcontext"] = keep(both).values();
    }
    r["dx"] = keep(from_q).values();
    return r;
  }
};

// The largest error of each array, and the largest value that it should have.
inline std::pair<double, double> error_of(const std::vector<double>& want, const std::vector<double>& have) {
  REQUIRE(want.size() == have.size());
  double error = 0, size = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    error = std::isfinite(have[i]) ? std::max(error, std::fabs(want[i] - have[i])) : inf;
    size = std::max(size, std::fabs(want[i]));
  }
  return {error, size};
}
inline double worst_error(const results& want, const results& have) {
  double worst = 0;
  REQUIRE(want.size() == have.size());
  for (const auto& entry : want) {
    REQUIRE(have.count(entry.first) == 1);
    const auto e = error_of(entry.second, have.at(entry.first));
    UNSCOPED_INFO(entry.first << ": " << e.first << " of " << e.second);
    CHECK(e.second > 1e-3);  // an array of zeros would check nothing
    worst = std::max(worst, e.first / std::max(e.second, 1e-3));
  }
  return worst;
}

}  // namespace layer_reference
