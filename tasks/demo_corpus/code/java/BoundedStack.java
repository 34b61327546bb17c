public class BoundedStack {
    private final int[] slots;
    private int size = 0;

    public BoundedStack(int capacity) {
        slots = new int[capacity];
    }

    public boolean push(int value) {
        if (size == slots.length) {
            return false; // no room left
        }
        slots[size++] = value;
        return true;
    }

    public int pop() {
        if (size == 0) {
            throw new IllegalStateException("stack is empty");
        }
        return slots[--size];
    }

    public boolean isEmpty() {
        return size == 0;
    }
}
