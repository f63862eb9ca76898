# add_nvcc_sources(<target> INCLUDES <folder>... SOURCES <source>...): .cu files, compiled by nvcc for
# MLKIT_CUDA_ARCHITECTURES, join a program. add_nvcc_program(...), likewise: a program of them alone. MLKIT_NVCC says
# whether there is an nvcc to do so.
#
# nvcc is called as it is: CMake's own support for CUDA would give it the options of the C++ compiler.
find_package(CUDAToolkit 12.0 QUIET)
set(MLKIT_NVCC OFF)
if(CUDAToolkit_FOUND AND CUDAToolkit_NVCC_EXECUTABLE AND NOT MLKIT_SANITIZE AND NOT CMAKE_CROSSCOMPILING)
  set(MLKIT_NVCC ON)
endif()
set(MLKIT_CUDA_ARCHITECTURES 90a CACHE STRING "GPUs that nvcc compiles programs for, as in sm_90a")

function(add_nvcc_sources target)
  cmake_parse_arguments(PARSE_ARGV 1 program "" "" "INCLUDES;SOURCES")
  set(options -std=c++20 -O2 -lineinfo -DMLKIT_NO_OPENMP -Xcompiler -Wall,-Wextra,-Wno-unknown-pragmas)
  foreach(architecture IN LISTS MLKIT_CUDA_ARCHITECTURES)
    list(APPEND options -gencode arch=compute_${architecture},code=sm_${architecture})
  endforeach()
  if(MLKIT_WERROR)
    list(APPEND options -Werror all-warnings)
  endif()
  foreach(folder IN LISTS program_INCLUDES)
    list(APPEND options -I ${folder})
  endforeach()
  set(objects)
  foreach(source IN LISTS program_SOURCES)
    get_filename_component(name ${source} NAME_WE)
    set(object ${CMAKE_CURRENT_BINARY_DIR}/${target}.${name}.o)
    add_custom_command(OUTPUT ${object}
      COMMAND ${CMAKE_CXX_COMPILER_LAUNCHER} ${CUDAToolkit_NVCC_EXECUTABLE} ${options} -MD -MF ${object}.d -MT ${object}
              -c ${source} -o ${object}
      DEPENDS ${source} DEPFILE ${object}.d VERBATIM COMMENT "nvcc ${name}.cu")
    list(APPEND objects ${object})
  endforeach()
  target_sources(${target} PRIVATE ${objects})
  set_target_properties(${target} PROPERTIES LINKER_LANGUAGE CXX)
  target_link_options(${target} PRIVATE LINKER:--as-needed)
  target_link_libraries(${target} PRIVATE CUDA::cudart_static CUDA::cublasLt)
endfunction()

function(add_nvcc_program target)
  add_executable(${target})
  add_nvcc_sources(${target} ${ARGN})
endfunction()
