#include <iostream>
#include <map>
#include <sstream>
#include <string>

// Group words by how many letters they have.
std::map<std::size_t, int> lengths(const std::string& text) {
    std::map<std::size_t, int> result;
    std::istringstream in(text);
    std::string word;
    while (in >> word) {
        ++result[word.size()];
    }
    return result;
}

int main() {
    for (const auto& [length, count] : lengths("we went out to see the old mill")) {
        std::cout << length << ": " << count << '\n';
    }
    return 0;
}
