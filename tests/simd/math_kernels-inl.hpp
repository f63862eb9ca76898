// Applies a function of simd/math.hpp to an array, in each instruction set.

#define MLKIT_TEST_KERNEL(name)                                                           \
  template <class T>                                                                      \
  void name##_array(const T* in, T* out, int n) {                                         \
    for (int i = 0; i < n; i += vec<T>::width) name(vec<T>::load(in + i)).store(out + i); \
  }
MLKIT_TEST_KERNEL(exp)
MLKIT_TEST_KERNEL(exp2)
MLKIT_TEST_KERNEL(log)
MLKIT_TEST_KERNEL(erf)
MLKIT_TEST_KERNEL(tanh)
MLKIT_TEST_KERNEL(sigmoid)
MLKIT_TEST_KERNEL(silu)
MLKIT_TEST_KERNEL(gelu)
MLKIT_TEST_KERNEL(gelu_tanh)
MLKIT_TEST_KERNEL(relu)
MLKIT_TEST_KERNEL(tanh_derivative)
MLKIT_TEST_KERNEL(sigmoid_derivative)
MLKIT_TEST_KERNEL(silu_derivative)
MLKIT_TEST_KERNEL(gelu_derivative)
MLKIT_TEST_KERNEL(gelu_tanh_derivative)
MLKIT_TEST_KERNEL(relu_derivative)
#undef MLKIT_TEST_KERNEL

template <class F, class T>
void evaluate_array(const F& f, const T* in, T* values, T* derivatives, int n) {
  for (int i = 0; i < n; i += vec<T>::width) {
    evaluate(f, vec<T>::load(in + i)).store(values + i);
    evaluate_derivative(f, vec<T>::load(in + i)).store(derivatives + i);
  }
}
