#include <iostream>
#include <queue>
#include <string>
#include <vector>

struct Task {
    int priority;
    std::string name;

    bool operator<(const Task& other) const {
        return priority < other.priority;
    }
};

int main() {
    std::priority_queue<Task> todo;
    todo.push({2, "water the plants"});
    todo.push({5, "pay the rent"});
    todo.push({1, "sort old photos"});

    // The most urgent task comes out first.
    while (!todo.empty()) {
        std::cout << todo.top().priority << ' ' << todo.top().name << '\n';
        todo.pop();
    }
}
