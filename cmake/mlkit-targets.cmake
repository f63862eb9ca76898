# mlkit_define_targets(<include directory>): the targets mlkit::mlkit and mlkit::io, for the source tree and for the
# installed package alike. mlkit is headers alone, so what a consumer links against is found on the consumer's machine.

# find_package, with the target visible in the whole project, also from a subdirectory.
macro(_mlkit_find target)
  if(NOT TARGET ${target})
    find_package(${ARGN})
    if(TARGET ${target})
      set_target_properties(${target} PROPERTIES IMPORTED_GLOBAL TRUE)
    endif()
  endif()
endmacro()

function(mlkit_define_targets include_directory)
  if(TARGET mlkit::mlkit)
    return()
  endif()
  if(NOT DEFINED MLKIT_OPENMP)
    set(MLKIT_OPENMP ON)
  endif()

  add_library(mlkit::mlkit INTERFACE IMPORTED GLOBAL)
  target_include_directories(mlkit::mlkit INTERFACE ${include_directory})
  target_compile_features(mlkit::mlkit INTERFACE cxx_std_20)

  _mlkit_find(Threads::Threads Threads REQUIRED)
  target_link_libraries(mlkit::mlkit INTERFACE Threads::Threads)

  # Loops marked `omp simd` become vector code at -O2; this needs no OpenMP runtime.
  set(has_openmp_simd $<COMPILE_LANG_AND_ID:CXX,GNU,Clang,AppleClang>)
  target_compile_options(mlkit::mlkit INTERFACE $<${has_openmp_simd}:-fopenmp-simd>)
  target_compile_definitions(mlkit::mlkit INTERFACE $<${has_openmp_simd}:MLKIT_OPENMP_SIMD>)
  if(MLKIT_OPENMP)
    _mlkit_find(OpenMP::OpenMP_CXX OpenMP QUIET COMPONENTS CXX)
    if(TARGET OpenMP::OpenMP_CXX)
      target_link_libraries(mlkit::mlkit INTERFACE OpenMP::OpenMP_CXX)
    else()
      message(STATUS "mlkit: no OpenMP for ${CMAKE_CXX_COMPILER_ID}; threads come from std::thread")
    endif()
  endif()

  # mlkit/io reads adapter_config.json through nlohmann/json; nothing else in mlkit has a dependency.
  _mlkit_find(nlohmann_json::nlohmann_json nlohmann_json 3.9 QUIET)
  if(TARGET nlohmann_json::nlohmann_json)
    add_library(mlkit::io INTERFACE IMPORTED GLOBAL)
    target_link_libraries(mlkit::io INTERFACE mlkit::mlkit nlohmann_json::nlohmann_json)
  endif()
endfunction()
