// Every operation of vec<T>, exposed as functions on arrays, in each instruction set.

template <class T>
int vec_width() {
  return vec<T>::width;
}

// out gets one register per operation, in the order that vec.cpp expects.
template <class T>
void vec_arithmetic(const T* pa, const T* pb, const T* pc, T* out) {
  using V = vec<T>;
  const V a = V::load(pa), b = V::load(pb), c = V::load(pc);
  const T s = pb[0];
  const auto put = [&](V x) {
    x.store(out);
    out += V::width;
  };
  put(a + b), put(a - b), put(a * b), put(a / b), put(-a);
  put(a + s), put(a - s), put(a * s), put(a / s);
  put(s + a), put(s - a), put(s * a), put(s / a);
  V x = a;
  put(x += b), x = a;
  put(x -= b), x = a;
  put(x *= b), x = a;
  put(x /= b);
  put(fma(a, b, c)), put(max(a, b)), put(min(a, b)), put(abs(a));
  put(V(s)), put(V::zero());
  put(V::select(a < b, a, b)), put(V::select(a > b, a, b)), put(V::select(a <= b, a, b));
  put(V::select(a >= b, a, b)), put(V::select(a == b, a, c)), put(V::select(a != b, a, c));
  put(V::from_bits(a.bits())), put(V::from_bits(a.bits() ^ V::sign_bit()));
  *out++ = a.sum();
  *out = a.largest();
}

template <class T, class Memory>
void vec_load(const Memory* p, int n, T* out) {
  (n < 0 ? vec<T>::load(p) : vec<T>::load(p, n)).store(out);
}
template <class T, class Memory>
void vec_store(const T* in, Memory* p, int n) {
  if (n < 0)
    vec<T>::load(in).store(p);
  else
    vec<T>::load(in).store(p, n);
}
