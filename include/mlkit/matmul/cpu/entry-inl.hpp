// What the portable side of a product calls, one table of functions per instruction set, element and product type.

// The type that panels hold for operands of type E: bf16 stays bf16 only where pairs are multiplied natively.
#if MLKIT_SET_BF16
template <class E>
using panel_element = std::conditional_t<std::is_same_v<E, f16>, float, E>;
#else
template <class E>
using panel_element = std::conditional_t<std::is_same_v<E, double>, double, float>;
#endif

template <class E, class Product>
struct entry {
  using element = panel_element<E>;
  using kernel = gemm<element>;
  using narrow = thin<element>;
  using word = typename compute<element>::word;
  using sum = typename compute<element>::sum;

  static void pack(const Product& p, index_t first, index_t last, index_t at, void* panels, void* scratch) noexcept {
    kernel::pack_sliver(p, first, last, at, static_cast<word*>(panels), static_cast<element*>(scratch));
  }
  static void multiply(const Product& p, index_t row, index_t rows, index_t first, index_t last, index_t begin,
                       index_t end, const void* panels, void* scratch) noexcept {
    kernel::multiply(p, row, rows, first, last, begin, end, static_cast<const word*>(panels),
                     static_cast<word*>(scratch));
  }
  static index_t multiply_scratch(index_t lines) noexcept { return kernel::multiply_scratch(lines); }
  static index_t packed_depth(const Product& p) noexcept { return kernel::packed_depth(p); }
  static index_t few_bytes(const Product& p) noexcept {
    return p.right_lines * narrow::few_stride(p) * index_t{sizeof(sum)};
  }
  static void decode_few(const Product& p, bool dots, void* few) noexcept {
    if (dots)
      narrow::decode_few(p, static_cast<element*>(few));
    else
      narrow::decode_few(p, static_cast<sum*>(few));
  }
  static void dot(const Product& p, index_t row, index_t rows, const void* few, void* scratch) noexcept {
    narrow::dot(p, row, rows, static_cast<const element*>(few), static_cast<sum*>(scratch));
  }
  static void axpy(const Product& p, index_t row, index_t rows, const void* few, void* scratch) noexcept {
    narrow::axpy(p, row, rows, static_cast<const sum*>(few), static_cast<sum*>(scratch));
  }
  static index_t thin_scratch(const Product& p) noexcept {
    return std::max(narrow::scratch(p), narrow::axpy_scratch(p)) * index_t{sizeof(sum)};
  }
};

// Bytes of one depth block of right panels: a quarter to a half of common second-level caches.
inline constexpr index_t panel_block_bytes = index_t{768} << 10;

template <class E, class Product>
product_kernels<Product> product_entry() noexcept {
  using e = entry<E, Product>;
  return {sliver_lines<typename e::element>,
          vec<typename e::word>::width,
          tile_rows(tile_vectors),
          panel_block_bytes / index_t{sizeof(typename e::word)} / compute<typename e::element>::depth_block,
          index_t{sizeof(typename e::word)},
          pack_scratch<typename e::element> * index_t{sizeof(typename e::word)},
          &e::pack,
          &e::multiply,
          &e::multiply_scratch,
          &e::packed_depth,
          &e::few_bytes,
          &e::decode_few,
          &e::dot,
          &e::axpy,
          &e::thin_scratch};
}

// The layout of a panel packed beforehand, which stays valid for this set alone.
template <class E>
panel_layout packed_layout() noexcept {
  using element = panel_element<E>;
  return {sliver_lines<element>, vec<typename compute<element>::word>::width,
          index_t{sizeof(typename compute<element>::word)}, compute<element>::elements_per_word};
}
