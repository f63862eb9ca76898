// expect: epilogue: a chain is no stage
#include <mlkit/matmul.hpp>

void f(mlkit::matrix<float>& a, mlkit::matrix<float>& b, mlkit::matrix<float>& c) {
#ifdef CORRECT
  mlkit::matmul(mlkit::cpu{}, a, b, c, mlkit::epilogue{mlkit::scale{2.0f}, mlkit::relu{}});
#else
  mlkit::matmul(mlkit::cpu{}, a, b, c, mlkit::epilogue{mlkit::epilogue{mlkit::scale{2.0f}}, mlkit::relu{}});
#endif
}
