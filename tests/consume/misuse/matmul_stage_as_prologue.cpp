// expect: prologue: what a stage of an epilogue reads is not checked here
#include <mlkit/matmul.hpp>

void f(mlkit::matrix<float>& a, mlkit::matrix<float>& b, mlkit::matrix<float>& c, mlkit::tensor<float, 1>& g) {
#ifdef CORRECT
  mlkit::matmul(mlkit::cpu{}, a, b, c, mlkit::epilogue{mlkit::scale_columns{g}});
#else
  mlkit::matmul(mlkit::cpu{}, mlkit::prologue{a, mlkit::scale_columns{g}}, b, c);
#endif
}
