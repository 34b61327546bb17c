class TodoList {
  #tasks = [];
  #nextId = 1;

  add(title) {
    const task = { id: this.#nextId++, title, done: false };
    this.#tasks.push(task);
    return task.id;
  }

  finish(id) {
    const task = this.#tasks.find((t) => t.id === id);
    if (!task) throw new Error(`no task with id ${id}`);
    task.done = true;
  }

  get open() {
    return this.#tasks.filter((t) => !t.done).map((t) => t.title);
  }
}

const list = new TodoList();
const first = list.add('buy stamps');
list.add('call the dentist');
list.finish(first);
console.log(list.open);
