# Headers, the CMake package and the pkg-config file. Nothing is compiled, so all of it is architecture-independent
# and the package can be moved after it has been installed.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_DATADIR}/cmake/mlkit)

install(DIRECTORY include/mlkit DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})

configure_file(cmake/mlkit-config.cmake mlkit-config.cmake @ONLY)
write_basic_package_version_file(mlkit-config-version.cmake COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/mlkit-config.cmake ${CMAKE_CURRENT_BINARY_DIR}/mlkit-config-version.cmake
              cmake/mlkit-targets.cmake
        DESTINATION ${package_dir})

configure_file(cmake/mlkit.pc.in mlkit.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/mlkit.pc DESTINATION ${CMAKE_INSTALL_DATADIR}/pkgconfig)
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/mlkit)
