# find_package(mlkit) gives mlkit::mlkit, and mlkit::io where nlohmann/json is found.
# Set MLKIT_OPENMP to OFF before it to take threads from std::thread instead of OpenMP.
include(${CMAKE_CURRENT_LIST_DIR}/mlkit-targets.cmake)
get_filename_component(_mlkit_include "${CMAKE_CURRENT_LIST_DIR}/../../../@CMAKE_INSTALL_INCLUDEDIR@" ABSOLUTE)
mlkit_define_targets(${_mlkit_include})
unset(_mlkit_include)
