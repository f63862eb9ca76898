// What the portable side of a product calls: functions of each element, of each type of operand and of output, per
// instruction set.

// The type that panels hold for operands of type E: bf16 stays bf16 only where pairs are multiplied natively.
#if MLKIT_SET_BF16
template <class E>
using panel_element = std::conditional_t<std::is_same_v<E, f16>, float, E>;
#else
template <class E>
using panel_element = std::conditional_t<std::is_same_v<E, double>, double, float>;
#endif

template <class Element, class Source>
struct operand_entry {
  using word = typename compute<Element>::word;
  using sum = typename compute<Element>::sum;
  using narrow = thin<Element>;

  static const operand<Source>& of(const void* op) noexcept { return *static_cast<const operand<Source>*>(op); }

  static void left_panel(const void* op, index_t line, index_t lines, index_t k, index_t depth, void* panel,
                         void* scratch, index_t done) noexcept {
    pack_left(of(op), line, lines, k, depth, static_cast<Element*>(panel), static_cast<Element*>(scratch), done);
  }
  static void right_panel(const void* op, index_t line, index_t lines, index_t width, index_t k, index_t depth,
                          void* panel, void* scratch) noexcept {
    pack_right<Element>(of(op), line, lines, width, k, depth, static_cast<word*>(panel),
                        static_cast<Element*>(scratch));
  }
  static void decode_few(const void* op, index_t lines, bool dots, void* few, index_t stride) noexcept {
    if (dots)
      narrow::decode_few(of(op), lines, static_cast<Element*>(few), stride);
    else
      narrow::decode_few(of(op), lines, static_cast<sum*>(few), stride);
  }
  static void add_dots(const void* op, index_t row, index_t rows, index_t parts, index_t apart, const void* few,
                       index_t few_stride, index_t few_lines, void* sums, void* decoded) noexcept {
    narrow::add_dots(of(op), row, rows, parts, apart, static_cast<const Element*>(few), few_stride, few_lines,
                     static_cast<vec<sum>*>(sums), static_cast<Element*>(decoded));
  }
  static void add_rows(const void* op, index_t first, index_t lines, const void* few, index_t few_stride,
                       index_t few_lines, void* sums, void* decoded) noexcept {
    narrow::add_rows(of(op), first, lines, static_cast<const sum*>(few), few_stride, few_lines, static_cast<sum*>(sums),
                     static_cast<sum*>(decoded));
  }
  static constexpr operand_kernels kernels{left_panel, right_panel, decode_few, add_dots, add_rows};

  static any_operand forget(const operand<Source>& op) noexcept {
    any_operand any{&op, &kernels, op.lines(), op.depth(), op.depth_first, nullptr, 0, 0, 0, false, false};
    if constexpr (is_dense<Source>) {
      using T = typename Source::value_type;
      any.data = reinterpret_cast<const char*>(op.source.data);
      any.row_stride = op.source.row_stride;
      any.col_stride = op.source.col_stride;
      any.element_bytes = sizeof(T);
      any.as_multiplied = std::is_same_v<T, Element>;
      any.readable = narrow::template readable<Source, Element>;
    }
    return any;
  }
};

template <class Sum, class Output>
void finish_rows(const void* to, index_t row, index_t rows, index_t col, index_t cols, const void* sums,
                 index_t sums_stride) noexcept {
  for (index_t i = 0; i < rows; ++i)
    finish_run(*static_cast<const Output*>(to), row + i, col, cols, static_cast<const Sum*>(sums) + i * sums_stride);
}

// Stages may know, when they run, that they change nothing.
template <class... Stages>
bool changes_nothing(const epilogue<Stages...>& e) noexcept {
  const auto one = [](const auto& stage) {
    if constexpr (requires { stage.changes_nothing(); })
      return stage.changes_nothing();
    else
      return false;
  };
  return e.stages.apply([&](const auto&... stage) { return (one(stage) && ...); });
}

template <class Element>
struct product_entry {
  using kernel = gemm<Element>;
  using narrow = thin<Element>;
  using word = typename compute<Element>::word;
  using sum = typename compute<Element>::sum;

  static void pack(const any_product& p, index_t first, index_t last, index_t at, void* panels,
                   void* scratch) noexcept {
    kernel::pack_sliver(p, first, last, at, static_cast<word*>(panels), static_cast<Element*>(scratch));
  }
  static void multiply(const any_product& p, index_t row, index_t rows, index_t first, index_t last, index_t begin,
                       index_t end, const void* panels, void* scratch) noexcept {
    kernel::multiply(p, row, rows, first, last, begin, end, static_cast<const word*>(panels),
                     static_cast<word*>(scratch));
  }
  static index_t few_bytes(const any_product& p) noexcept {
    return p.right_lines * narrow::few_stride(p) * index_t{sizeof(sum)};
  }
  static void dot(const any_product& p, index_t row, index_t rows, const void* few, void* scratch) noexcept {
    narrow::dot(p, row, rows, static_cast<const Element*>(few), static_cast<sum*>(scratch));
  }
  static void axpy(const any_product& p, index_t row, index_t rows, const void* few, void* scratch) noexcept {
    narrow::axpy(p, row, rows, static_cast<const sum*>(few), static_cast<sum*>(scratch));
  }
  static index_t thin_scratch(const any_product& p) noexcept {
    return std::max(narrow::scratch(p), narrow::axpy_scratch(p)) * index_t{sizeof(sum)};
  }
  // Bytes of one depth block of right panels: a quarter to a half of common second-level caches.
  static constexpr index_t panel_block_bytes = index_t{768} << 10;
  static constexpr product_kernels kernels{sliver_lines<Element>,
                                           vec<word>::width,
                                           tile_rows<Element>(tile_vectors),
                                           panel_block_bytes / index_t{sizeof(word)} / compute<Element>::depth_block,
                                           index_t{sizeof(word)},
                                           pack_scratch<Element>* index_t{sizeof(word)},
                                           pack,
                                           multiply,
                                           kernel::multiply_scratch,
                                           kernel::packed_depth,
                                           few_bytes,
                                           narrow::decode_few,
                                           dot,
                                           axpy,
                                           thin_scratch};
};

template <class Element, class Left, class Right>
any_segment forget_segment(const segment<Left, Right>& s) noexcept {
  return {operand_entry<Element, Left>::forget(s.left), operand_entry<Element, Right>::forget(s.right), s.packed_right};
}

// A product in elements of type E, for the kernels of this set; it refers to p.
template <class E, class Product>
any_product forget_product(const Product& p) noexcept {
  using element = panel_element<E>;
  using sum = typename compute<element>::sum;
  const auto& to = p.output;
  using Out = std::remove_reference_t<decltype(*to.c)>;
  constexpr int count = std::tuple_size_v<decltype(p.segments)>;
  static_assert(count <= any_product::most_segments);
  any_product any{&product_entry<element>::kernels,
                  {},
                  count,
                  p.left_lines,
                  p.right_lines,
                  false,
                  reinterpret_cast<char*>(to.c),
                  to.row_stride,
                  to.col_stride,
                  index_t{sizeof(Out)},
                  std::is_same_v<Out, sum> && changes_nothing(*to.epilogue),
                  &to,
                  finish_rows<sum, std::remove_cvref_t<decltype(to)>>};
  int at = 0;
  std::apply([&](const auto&... s) { ((any.segments[at++] = forget_segment<element>(s)), ...); }, p.segments);
  return any;
}

// The layout of a panel packed beforehand, which stays valid for this set alone.
template <class E>
panel_layout packed_layout() noexcept {
  using element = panel_element<E>;
  return {sliver_lines<element>, vec<typename compute<element>::word>::width,
          index_t{sizeof(typename compute<element>::word)}, compute<element>::elements_per_word,
          compute<element>::words_at_once};
}
