// Packing: elements of an operand, decoded from whatever it is stored as, laid out for the tiles.

// Copies `bytes`, at most twice `Size` and a multiple of 2, by two pieces that may overlap.
template <int Size>
MLKIT_ALWAYS_INLINE void copy_pieces(const char* from, index_t bytes, char* to) noexcept {
  if (bytes >= Size) {
    char first[Size], last[Size];
    __builtin_memcpy(first, from, Size);
    __builtin_memcpy(last, from + bytes - Size, Size);
    __builtin_memcpy(to, first, Size);
    __builtin_memcpy(to + bytes - Size, last, Size);
  } else if constexpr (Size > 2) {
    copy_pieces<Size / 2>(from, bytes, to);
  }
}

// Copies a run of elements, of which most are so short that a call would take longer.
MLKIT_ALWAYS_INLINE void copy_run(const void* source, index_t bytes, void* out) noexcept {
  constexpr index_t size = MLKIT_SET_BITS / 8, many = 512;
  const char* from = static_cast<const char*>(source);
  char* to = static_cast<char*>(out);
  if (bytes > many) {
    __builtin_memcpy(to, from, static_cast<std::size_t>(bytes));
    return;
  }
  for (; bytes > 2 * size; bytes -= size, from += size, to += size) {
    __builtin_memcpy(to, from, size);
    asm volatile("" : "+r"(to));  // or compilers make a call of the loop
  }
  copy_pieces<size>(from, bytes, to);
}

// The same past the caches, but for the ends of the run, which fill no line.
inline void copy_past_caches(const void* source, index_t bytes, void* out) noexcept {
  using V = vec<float>;
  constexpr index_t line = 64, registers = line / index_t{sizeof(V)};
  const char* from = static_cast<const char*>(source);
  char* to = static_cast<char*>(out);
  const index_t head =
      std::min(bytes, (line - static_cast<index_t>(reinterpret_cast<std::uintptr_t>(to) % line)) % line);
  copy_run(from, head, to);
  index_t at = head;
  for (; at + line <= bytes; at += line) {
    MLKIT_UNROLL
    for (index_t r = 0; r < registers; ++r)
      V::load(reinterpret_cast<const float*>(from + at) + r * V::width)
          .store_past_caches(reinterpret_cast<float*>(to + at) + r * V::width);
  }
  copy_run(from + at, bytes - at, to + at);
}

// out[0, count) = elements [row, col .. col + count) of a source. The overload for sources of the user's own calls
// their member; other headers add overloads for theirs in this namespace, found through the tag.
template <class T, class Out>
void decode_run(set_tag, const dense_source<T>& s, index_t row, index_t col, index_t count,
                Out* MLKIT_RESTRICT out) noexcept {
  const T* p = s.data + row * s.row_stride + col * s.col_stride;
  if (s.col_stride != 1) {
    for (index_t i = 0; i < count; ++i) out[i] = static_cast<Out>(p[i * s.col_stride]);
  } else if constexpr (std::is_same_v<T, Out>) {
    copy_run(p, count * index_t{sizeof(T)}, out);
  } else if constexpr (std::is_same_v<T, double> || std::is_same_v<Out, double>) {
    for (index_t i = 0; i < count; ++i) out[i] = static_cast<Out>(p[i]);
  } else {
    using V = vec<float>;
    index_t i = 0;
    for (; i + V::width <= count; i += V::width) V::load(p + i).store(out + i);
    if (i < count) V::load(p + i, static_cast<int>(count - i)).store(out + i, static_cast<int>(count - i));
  }
}

template <matrix_source S, class Out>
  requires(!is_dense<S>)
MLKIT_ALWAYS_INLINE void decode_run(set_tag, const S& s, index_t row, index_t col, index_t count,
                                    Out* out) noexcept requires requires {
  s.decode(row, col, 1, out);
}
{ s.decode(row, col, static_cast<int>(count), out); }

// How many words of k a block of elements takes.
template <class Element>
constexpr index_t words(index_t elements) noexcept {
  using C = compute<Element>;
  return round_up(ceil_div(elements, index_t{C::elements_per_word}), C::words_at_once);
}

// Where elements share words, or words are multiplied many at once, those that are missing are zero.
template <class Element>
MLKIT_ALWAYS_INLINE void pad_last_word(Element* row, index_t elements) noexcept {
  if constexpr (in_matrices<Element>) {
    const index_t missing = 2 * words<Element>(elements) - elements;
    __builtin_memset(static_cast<void*>(row + elements), 0, static_cast<std::size_t>(missing) * sizeof(Element));
  } else if constexpr (compute<Element>::elements_per_word == 2) {
    if (elements % 2) row[elements] = Element::from_bits(0);
  }
}

// The smallest scratch that packing needs: one block of runs, before it is transposed.
template <class Element>
inline constexpr index_t pack_scratch = 16 * panel_stride<Element>* compute<Element>::elements_per_word;

// out[l] = the word of even[l] and odd[l], for `width` lines, whole registers; the first `lines` are read, the others
// zero.
#if MLKIT_SET_BF16
inline void interleave(const bf16* even, const bf16* odd, index_t lines, index_t width, float* out) noexcept {
  alignas(64) static constexpr std::uint16_t first[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                          8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(first), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (index_t l = 0; l < width; l += 32) {
    const index_t rest = std::clamp<index_t>(lines - l, 0, 32);
    const __mmask32 some = _bzhi_u32(0xffffffffu, static_cast<unsigned>(rest));
    const __m512i e = _mm512_maskz_loadu_epi16(some, even + l), o = _mm512_maskz_loadu_epi16(some, odd + l);
    _mm512_storeu_si512(out + l, _mm512_permutex2var_epi16(e, low, o));
    if (l + 16 < width) _mm512_storeu_si512(out + l + 16, _mm512_permutex2var_epi16(e, high, o));
  }
}
#endif

// Left panel: panel[line][word of k], rows `panel_stride` words apart. [lines] x [k, k + depth). The first `done`
// elements of each line are there already, where lines are runs.
template <class Element, class Source>
void pack_left(const operand<Source>& op, index_t line, index_t lines, index_t k, index_t depth, Element* panel,
               Element* MLKIT_RESTRICT scratch, index_t done) noexcept {
  constexpr index_t stride = panel_stride<Element> * compute<Element>::elements_per_word;
  if (op.depth_first) {
    if (done == depth && compute<Element>::elements_per_word == 1) return;
    for (index_t l = 0; l < lines; ++l) {
      decode_run(set_tag{}, op.source, line + l, k + done, depth - done, panel + l * stride + done);
      pad_last_word(panel + l * stride, depth);
    }
    return;
  }
  // A scratch block of runs along lines, which become 16 words of each line.
  constexpr index_t per_word = compute<Element>::elements_per_word, runs = 16 * per_word, span = 64;
  for (index_t p = 0; p < depth; p += runs) {
    const index_t n = std::min(runs, depth - p);
    for (index_t l = 0; l < lines; l += span) {
      const index_t m = std::min(span, lines - l);
      for (index_t r = 0; r < n; ++r) decode_run(set_tag{}, op.source, k + p + r, line + l, m, scratch + r * span);
      Element* const to = panel + l * stride + p;
      if constexpr (per_word == 1) {
        transpose(scratch, span, n, m, to, stride);
      } else {
        using word = typename compute<Element>::word;
        word* const pairs = reinterpret_cast<word*>(scratch + runs * span);
        if (n % 2) std::fill_n(scratch + n * span, m, Element{});
        for (index_t r = 0; r < n; r += 2)
          interleave(scratch + r * span, scratch + (r + 1) * span, m, span, pairs + r / 2 * span);
        transpose(pairs, span, ceil_div(n, index_t{2}), m, reinterpret_cast<word*>(to), stride / per_word);
      }
    }
  }
  for (index_t l = 0; l < lines; ++l) pad_last_word(panel + l * stride, depth);
}

// Right panel: panel[word of k][line], `width` words a row; lines beyond the last are zero.
template <class Element, class Source>
void pack_right(const operand<Source>& op, index_t line, index_t lines, index_t width, index_t k, index_t depth,
                typename compute<Element>::word* panel, Element* MLKIT_RESTRICT scratch) noexcept {
  using word = typename compute<Element>::word;
  constexpr int per_word = compute<Element>::elements_per_word;
  if (op.depth_first) {  // lines are runs along k: transpose groups of them, a vector's worth at a time
    constexpr index_t group = vec<word>::width;
    constexpr index_t stride = panel_stride<Element> * per_word;
    for (index_t l = 0; l < width; l += group) {
      const index_t n = std::max<index_t>(0, std::min(group, lines - l));
      if constexpr (std::is_same_v<Source, dense_source<Element>> && per_word == 1) {
        if (op.source.col_stride == 1 && n == group) {
          transpose(op.source.data + (line + l) * op.source.row_stride + k, op.source.row_stride, group, depth,
                    panel + l, width);
          continue;
        }
      }
      for (index_t i = 0; i < n; ++i) {
        decode_run(set_tag{}, op.source, line + l + i, k, depth, scratch + i * stride);
        pad_last_word(scratch + i * stride, depth);
      }
      for (index_t i = n; i < group; ++i)
        __builtin_memset(static_cast<void*>(scratch + i * stride), 0,
                         static_cast<std::size_t>(words<Element>(depth)) * sizeof(word));
      transpose(reinterpret_cast<const word*>(scratch), stride / per_word, group, words<Element>(depth), panel + l,
                width);
    }
    return;
  }
  // Rows of the source lie far apart: what hardware fetches ahead is of no use here.
  const auto fetch_row = [&](index_t p) {
    if constexpr (is_dense<Source>) {
      constexpr index_t rows_ahead = 16;
      const auto* row = op.source.data + (k + p + rows_ahead) * op.source.row_stride + line;
      for (index_t l = 0; l < lines; l += 64 / index_t{sizeof(*row)}) __builtin_prefetch(row + l, 0, 2);
    }
  };
  if constexpr (per_word == 1) {
    for (index_t p = 0; p < depth; ++p) {
      fetch_row(p);
      decode_run(set_tag{}, op.source, k + p, line, lines, panel + p * width);
      for (index_t l = lines; l < width; ++l) panel[p * width + l] = word{};
    }
  } else {  // two runs interleave into one row of words
    constexpr index_t most = 4 * vec<word>::width;
    const Element* even = scratch;
    const Element* odd = scratch + most;
    for (index_t p = 0; p < depth; p += 2) {
      fetch_row(p), fetch_row(p + 1);
      const bool pair = p + 1 < depth;
      bool in_place = false;
      if constexpr (std::is_same_v<Source, dense_source<Element>>) {
        if (op.source.col_stride == 1) {
          in_place = true;
          even = op.source.data + (k + p) * op.source.row_stride + line;
          odd = even + op.source.row_stride;
        }
      }
      if (!in_place) {
        decode_run(set_tag{}, op.source, k + p, line, lines, scratch);
        if (pair) decode_run(set_tag{}, op.source, k + p + 1, line, lines, scratch + most);
      }
      if (!pair) {
        for (index_t l = 0; l < lines; ++l) scratch[most + l] = Element::from_bits(0);
        odd = scratch + most;
      }
      interleave(even, odd, lines, width, panel + (p / 2) * width);
    }
    const index_t there = ceil_div(depth, index_t{2});
    std::fill_n(panel + there * width, (words<Element>(depth) - there) * width, word{});
  }
}
