export class EventBus {
  constructor() {
    this.listeners = new Map();
  }

  on(name, listener) {
    const known = this.listeners.get(name) ?? new Set();
    known.add(listener);
    this.listeners.set(name, known);
    // The caller may use the returned function to unsubscribe.
    return () => known.delete(listener);
  }

  emit(name, payload) {
    for (const listener of this.listeners.get(name) ?? []) {
      listener(payload);
    }
  }
}

const bus = new EventBus();
const off = bus.on('greet', (who) => console.log(`hello ${who}`));
bus.emit('greet', 'Ines');
off();
