"""The pretend CUDA device: C++ in device.cpp and its headers, and the Python side."""
