// Weights packed once: right in every product, sized as stated, refused where they cannot be read.
#include "reference.hpp"

using namespace reference;
using mlkit::bf16;
using mlkit::cpu;
using mlkit::f16;

namespace {

template <class E, class A, class B, class C>
void check_packed(const shape& s, std::uint64_t seed) {
  const auto la = static_cast<layout>(pick(seed, 1, layouts)), lb = static_cast<layout>(pick(seed, 2, layouts)),
             lc = static_cast<layout>(pick(seed, 3, layouts));
  guarded<A> a(s.m, s.k, la);
  guarded<B> b(s.k, s.n, lb);
  guarded<C> c(s.m, s.n, lc);
  a.fill(seed);
  b.fill(seed + 1000);
  sums expected = naive(a.view(), b.view());
  const auto packed = mlkit::pack<E>(cpu{}, b.view());
  REQUIRE(packed.rows() == s.k);
  REQUIRE(packed.cols() == s.n);
  mlkit::matmul(cpu{}, a.view(), packed, c.view());
  expect(c.view(), expected, "packed, " + describe(s, la, lb, lc));
  REQUIRE(c.untouched_outside());
}

template <class E, class A, class B, class C>
void check_packed_shapes(int count) {
  for (int i = 0; i < count; ++i) {
    const auto seed = static_cast<std::uint64_t>(i);
    check_packed<E, A, B, C>({1 + i % 40, 1 + pick(seed, 4, 200), 1 + pick(seed, 5, 90)}, seed);
  }
  for (index_t m : {1, 3, 5, 25, 200}) check_packed<E, A, B, C>({m, 131, 1030}, static_cast<std::uint64_t>(m));
  check_packed<E, A, B, C>({9, 700, 50}, 7);  // more than one block of right lines
  check_packed<E, A, B, C>({5, 7, 0}, 1);
  check_packed<E, A, B, C>({0, 7, 3}, 1);
  check_packed<E, A, B, C>({3, 0, 3}, 1);
}

}  // namespace

TEST_CASE("packed f32 weights give the product") {
  for_each_isa([] { check_packed_shapes<void, float, float, float>(120); });
}
TEST_CASE("packed f64 weights give the product") {
  for_each_isa([] { check_packed_shapes<void, double, double, double>(80); });
}
TEST_CASE("packed bf16 weights give the product") {
  for_each_isa([] { check_packed_shapes<void, bf16, bf16, bf16>(80); });
}
TEST_CASE("bf16 weights packed as f32 multiply f32 activations") {
  for_each_isa([] { check_packed_shapes<float, float, bf16, float>(40); });
}
TEST_CASE("packed f16 weights multiply f16 activations") {
  for_each_isa([] { check_packed_shapes<void, f16, f16, float>(40); });
}

TEST_CASE("packed weights hold their padded size, and nothing else") {
  for_each_isa([] {
    const index_t width = mlkit::active_isa() >= mlkit::isa::avx512 ? 16
                          : mlkit::active_isa() == mlkit::isa::avx2 ? 8
                                                                    : 4;
    const mlkit::matrix<float> w({301, 77});
    CHECK(mlkit::pack(cpu{}, w).bytes() == 301 * ((77 + width - 1) / width * width) * 4);
    const mlkit::matrix<bf16> h({301, 77});
    const index_t words = mlkit::active_isa() == mlkit::isa::amx           ? 160
                          : mlkit::active_isa() == mlkit::isa::avx512_bf16 ? 151
                                                                           : 301;
    CHECK(mlkit::pack(cpu{}, h).bytes() == words * ((77 + width - 1) / width * width) * 4);
    CHECK(mlkit::pack(cpu{}, mlkit::matrix<float>({0, 5})).bytes() == 0);
  });
}

TEST_CASE("packed weights are refused by an instruction set that reads others") {
  if (!mlkit::isa_available(mlkit::isa::avx2)) return;
  const mlkit::isa before = mlkit::active_isa();
  const mlkit::matrix<float> x({3, 20}), w({20, 30});
  mlkit::matrix<float> y({3, 30});
  y(0, 0) = 5;
  mlkit::set_isa(mlkit::isa::avx2);
  const auto packed = mlkit::pack(cpu{}, w);
  mlkit::set_isa(mlkit::isa::baseline);
  CHECK_THROWS_AS(mlkit::matmul(cpu{}, x, packed, y), mlkit::value_error);
  CHECK(y(0, 0) == 5);
  mlkit::set_isa(mlkit::isa::avx2);
  mlkit::matmul(cpu{}, x, packed, y);
  CHECK(y(0, 0) == 0);
  if (mlkit::isa_available(mlkit::isa::avx512) && mlkit::isa_available(mlkit::isa::avx512_bf16)) {
    mlkit::set_isa(mlkit::isa::avx512);
    const auto shared = mlkit::pack(cpu{}, w);
    mlkit::set_isa(mlkit::isa::avx512_bf16);
    CHECK_NOTHROW(mlkit::matmul(cpu{}, x, shared, y));
  }
  mlkit::set_isa(before);
}

TEST_CASE("packing moves, and refuses what is no matrix") {
  const mlkit::matrix<float> w({20, 30});
  auto packed = mlkit::pack(cpu{}, w);
  const auto moved = std::move(packed);
  CHECK(moved.cols() == 30);
  CHECK(packed.cols() == 0);
  CHECK(packed.bytes() == 0);
  CHECK_THROWS_AS(mlkit::pack(cpu{}, mlkit::matrix_view<const float>(nullptr, {2, 3})), mlkit::value_error);
  CHECK_THROWS_AS(mlkit::pack(cpu{}, mlkit::matrix_view<const float>(w.data(), {-2, 3})), mlkit::shape_error);
  mlkit::matrix<float> x({3, 20}), y({3, 31});
  CHECK_THROWS_AS(mlkit::matmul(cpu{}, x, moved, y), mlkit::shape_error);
}
