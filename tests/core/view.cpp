// Views: what they are made from, what they refuse and in which words. Tensors.
#include <mlkit/core/tensor.hpp>
#include <mlkit/core/view.hpp>

#include <array>
#include <catch2/catch.hpp>
#include <cstdint>
#include <span>
#include <vector>

using namespace mlkit;

namespace {

// What std::mdspan looks like, column-major.
struct mdspan_look_alike {
  float* pointer;
  static constexpr std::size_t rank() { return 2; }
  std::size_t extent(std::size_t d) const { return d == 0 ? 3 : 4; }
  std::size_t stride(std::size_t d) const { return d == 0 ? 1 : 3; }
  float* data_handle() const { return pointer; }
};

struct has_another_view {
  int view() const { return 0; }
};

template <class V, class T, int Rank>
constexpr bool gives = std::is_same_v<decltype(as_view(std::declval<V>())), tensor_view<T, Rank>>;

static_assert(viewable<std::vector<float>&, 1> && viewable<const std::vector<float>&, 1>);
static_assert(viewable<std::vector<float>, 1> && viewable<std::span<const double>, 1>);
static_assert(viewable<tensor<bf16, 3>, 3> && viewable<const tensor<f16, 2>&, 2>);
static_assert(viewable<tensor_view<const float, 2>, 2> && viewable<const tensor_view<float, 2>&, 2>);
static_assert(viewable<mdspan_look_alike, 2> && viewable<const mdspan_look_alike&, 2>);
static_assert(!viewable<std::vector<float>, 2> && !viewable<std::vector<int>, 1> && !viewable<int, 1>);
static_assert(!viewable<has_another_view, 1> && !viewable<std::vector<bool>, 1>);
static_assert(gives<std::vector<float>&, float, 1> && gives<const std::vector<float>&, const float, 1>);
static_assert(gives<std::span<float>, float, 1> && gives<const std::span<float>&, float, 1>);
static_assert(gives<std::span<const float>, const float, 1> && gives<std::array<double, 3>&, double, 1>);
static_assert(gives<tensor<float, 2>&, float, 2> && gives<const tensor<float, 2>&, const float, 2>);
static_assert(gives<tensor<float, 2>, float, 2> && gives<tensor_view<const float, 2>, const float, 2>);
static_assert(gives<mdspan_look_alike, float, 2>);
static_assert(std::is_same_v<element_t<const tensor<bf16, 2>&>, bf16>);
static_assert(std::is_same_v<element_t<std::vector<double>>, double>);
static_assert(std::is_convertible_v<tensor_view<float, 2>, tensor_view<const float, 2>>);
static_assert(!std::is_convertible_v<tensor_view<const float, 2>, tensor_view<float, 2>>);

}  // namespace

TEST_CASE("views are made from pointers, containers, tensors and mdspan's members", "[view]") {
  std::vector<float> data(12);
  for (int i = 0; i < 12; ++i) data[i] = static_cast<float>(i);

  const tensor_view<float, 2> rows(data.data(), {3, 4});
  CHECK(rows.strides == extents_t<2>{4, 1});
  CHECK(rows(2, 1) == 9);
  CHECK(rows.size() == 12);
  CHECK(rows.contiguous());

  const tensor_view<float, 2> wide(data.data(), {3, 2}, {4, 1});
  CHECK(wide(1, 1) == 5);
  CHECK_FALSE(wide.contiguous());

  const auto turned = transposed(rows);
  CHECK(turned.extents == extents_t<2>{4, 3});
  CHECK(turned(1, 2) == rows(2, 1));
  CHECK_FALSE(turned.contiguous());
  CHECK(transposed(turned).contiguous());

  const auto columns = as_view(mdspan_look_alike{data.data()});
  CHECK(columns.extents == extents_t<2>{3, 4});
  CHECK(columns(2, 1) == 5);

  CHECK(as_view(data).extent(0) == 12);
  CHECK(as_view(data).data == data.data());
  CHECK(as_view(std::span(data).subspan(2, 3))(1) == 3);

  const tensor<float, 2> owned = tensor<float, 2>::of({2, 3}, {1, 2, 3, 4, 5, 6});
  CHECK(as_view(owned)(1, 0) == 4);
  CHECK(transposed(owned)(0, 1) == 4);
  CHECK(as_view(tensor<float, 1>::of({2}, {7, 8}))(1) == 8);  // a temporary, for the length of the expression

  CHECK(tensor_view<float, 2>(nullptr, {0, 5}).empty());
  CHECK(tensor_view<float, 3>(data.data(), {1, 3, 1}, {99, 1, -7}).contiguous());  // strides of extent 1 do not matter
}

TEST_CASE("check_view names the function, the argument and the fault", "[view]") {
  float x = 0;
  using view = tensor_view<float, 2>;
  CHECK_NOTHROW(detail::check_view("f", "a", view(&x, {1, 1})));
  CHECK_NOTHROW(detail::check_view("f", "a", view(nullptr, {0, 4})));
  CHECK_THROWS_WITH(detail::check_view("f", "a", view(nullptr, {2, 4})),
                    "mlkit::value_error: f: a is null, but has shape [2, 4]");
  CHECK_THROWS_WITH(detail::check_view("f", "a", view(&x, {2, -4})),
                    "mlkit::shape_error: f: a has the negative extent -4 in dimension 1");
  const index_t huge = index_t{1} << 40;
  CHECK_THROWS_WITH(detail::check_view("f", "a", view(&x, {huge, huge}, {0, 0})),
                    "mlkit::shape_error: f: a of shape [1099511627776, 1099511627776] and strides [0, 0] is too large");
  CHECK_THROWS_AS(detail::check_view("f", "a", view(&x, {2, 2}, {INT64_MAX, 1})), shape_error);
  CHECK_THROWS_AS(detail::check_view("f", "a", view(&x, {2, 2}, {INT64_MIN, 1})), shape_error);
}

TEST_CASE("check_output refuses strides that name an element twice", "[view]") {
  std::vector<float> data(64);
  const auto check = [&](extents_t<2> shape, extents_t<2> strides) {
    detail::check_output("f", "out", tensor_view<float, 2>(data.data() + 32, shape, strides));
  };
  CHECK_NOTHROW(check({3, 4}, {4, 1}));
  CHECK_NOTHROW(check({4, 3}, {1, 4}));
  CHECK_NOTHROW(check({3, 4}, {-4, 1}));
  CHECK_NOTHROW(check({3, 4}, {9, 2}));
  CHECK_NOTHROW(check({1, 4}, {0, 1}));
  CHECK_NOTHROW(check({0, 4}, {0, 0}));
  CHECK_THROWS_WITH(check({3, 4}, {3, 1}), "mlkit::shape_error: f: out of shape [3, 4] has overlapping strides [3, 1]");
  CHECK_THROWS_WITH(check({3, 4}, {0, 1}), "mlkit::shape_error: f: out of shape [3, 4] has overlapping strides [0, 1]");
  CHECK_THROWS_AS(check({3, 4}, {1, -1}), shape_error);
}

TEST_CASE("check_disjoint refuses shared memory, and only that", "[view]") {
  std::vector<float> data(64);
  using view = tensor_view<float, 2>;
  const auto check = [](const view& out, const view& x) { detail::check_disjoint("f", "out", out, "x", x); };
  const view low(data.data(), {4, 8}), high(data.data() + 32, {4, 8});
  CHECK_NOTHROW(check(low, high));
  CHECK_NOTHROW(check(high, low));
  CHECK_NOTHROW(check(low, view(data.data(), {0, 8})));
  CHECK_THROWS_WITH(check(low, view(data.data() + 31, {1, 5})), "mlkit::shape_error: f: out [4, 8] overlaps x [1, 5]");
  CHECK_THROWS_AS(check(low, low), shape_error);
  CHECK_THROWS_AS(check(view(data.data() + 40, {4, 8}, {-8, 1}), low), shape_error);  // reaches back into low

  // Blocks of columns of one [8, 8] matrix.
  const view left(data.data(), {8, 3}, {8, 1}), right(data.data() + 3, {8, 5}, {8, 1});
  CHECK_NOTHROW(check(left, right));
  CHECK_NOTHROW(check(right, left));
  CHECK_NOTHROW(check(left, view(data.data() + 56 + 3, {8, 5}, {-8, 1})));
  CHECK_NOTHROW(check(left, view(data.data() + 8 + 3, {1, 5})));  // one row beside it
  CHECK_THROWS_AS(check(left, view(data.data() + 2, {8, 5}, {8, 1})), shape_error);
  CHECK_THROWS_AS(check(left, view(data.data() + 3, {7, 6}, {8, 1})), shape_error);  // runs into the next row
  CHECK_THROWS_AS(check(left, view(data.data() + 3, {8, 2}, {7, 1})), shape_error);  // another period
  // Against a brute-force count of shared elements: a refusal may be too careful, a permission never.
  for (index_t a : {1, 3, 8, 9})
    for (index_t b : {1, 3, 8, 9})
      for (index_t na : {1, 2, 3})
        for (index_t nb : {1, 2, 3})
          for (index_t shift = 0; shift < 12; ++shift) {
            const view x(data.data(), {3, na}, {a, 1}), y(data.data() + shift, {3, nb}, {b, 1});
            std::vector<int> used(64);
            bool shared = false;
            for (index_t i = 0; i < 3; ++i)
              for (index_t j = 0; j < na; ++j) used[&x(i, j) - data.data()] = 1;
            for (index_t i = 0; i < 3; ++i)
              for (index_t j = 0; j < nb; ++j) shared |= used[&y(i, j) - data.data()] == 1;
            bool refused = false;
            try {
              check(x, y);
            } catch (const shape_error&) {
              refused = true;
            }
            if (shared) REQUIRE(refused);
            if (!shared && a == b && a > na && a > nb && (na + nb <= a) && shift >= na && shift + nb <= a)
              REQUIRE_FALSE(refused);
          }
}

TEST_CASE("check_extent names both sizes", "[view]") {
  CHECK_NOTHROW(detail::check_extent("f", "x", "columns", 4, "base", 4));
  CHECK_THROWS_WITH(detail::check_extent("f", "x", "columns", 512, "base", 768),
                    "mlkit::shape_error: f: x has 512 columns, but base has 768");
}

TEST_CASE("numbers in messages read as what they are", "[error]") {
  using mlkit::detail::message;
  CHECK(message(1.5) == "1.5");
  CHECK(message(0.8f) == "0.8");
  CHECK(message(-1e-9) == "-1e-09");
  CHECK(message(1e300) == "1e+300");
  CHECK(message(16777217.0) == "16777217");
  CHECK(message(1.0000000001) == "1.0000000001");
  CHECK(message(8.0) == "8");
  CHECK(message(-7, std::uint64_t{UINT64_MAX}) == "-718446744073709551615");
}

TEST_CASE("every error is an mlkit::error and a std::runtime_error", "[error]") {
  CHECK_THROWS_AS(detail::fail_shape("a"), mlkit::error);
  CHECK_THROWS_AS(detail::fail_value("a"), std::runtime_error);
  CHECK_THROWS_WITH(detail::fail_value("gamma = ", 1.5, " is outside [0, 1]"),
                    "mlkit::value_error: gamma = 1.5 is outside [0, 1]");
}

TEMPLATE_TEST_CASE("tensors are zero, aligned, movable and cloned on demand", "[tensor]", float, double, bf16, f16) {
  for (index_t n : {1, 3, 17, 1000, 3 << 20}) {
    tensor<TestType, 2> t({n, 2});
    REQUIRE(reinterpret_cast<std::uintptr_t>(t.data()) % 64 == 0);
    bool zero = true;
    for (TestType x : t) zero &= static_cast<float>(x) == 0;
    CHECK(zero);
    t(n - 1, 1) = TestType(2.0f);
    const tensor<TestType, 2> copy = t.clone();
    const TestType* where = t.data();
    const tensor<TestType, 2> moved = std::move(t);
    CHECK(moved.data() == where);
    CHECK(t.size() == 0);
    CHECK(copy.data() != where);
    CHECK(static_cast<float>(copy(n - 1, 1)) == 2);
  }
  static_assert(!std::is_copy_constructible_v<tensor<TestType, 2>>);
  CHECK(tensor<TestType, 2>({0, 5}).size() == 0);
  CHECK(tensor<TestType, 2>().size() == 0);
}

TEST_CASE("tensor shapes that cannot be are refused", "[tensor]") {
  const index_t huge = index_t{1} << 40;
  CHECK_THROWS_WITH((tensor<float, 2>({3, -1})), "mlkit::shape_error: tensor: extent -1 in dimension 1 is negative");
  CHECK_THROWS_WITH((tensor<float, 2>({huge, huge})),
                    "mlkit::shape_error: tensor: shape [1099511627776, 1099511627776] is too large");
  CHECK_THROWS_AS((tensor<double, 1>({INT64_MAX / 4})), shape_error);
  CHECK(tensor<float, 4>({huge, 0, huge, huge}).size() == 0);
  CHECK_THROWS_WITH((tensor<float, 1>::of({3}, {1, 2})),
                    "mlkit::shape_error: tensor::of: values has 2 elements, but the shape has 3");
}
