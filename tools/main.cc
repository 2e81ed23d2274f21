#include "tools/command.h"

int main(int argc, char** argv) { return espalier::RunCommand(argc, argv); }
