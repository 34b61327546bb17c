class TreeNode<T> {
  left?: TreeNode<T>;
  right?: TreeNode<T>;

  constructor(readonly value: T) {}
}

export class SortedTree<T> {
  private root?: TreeNode<T>;

  insert(value: T): void {
    this.root = this.place(this.root, value);
  }

  private place(node: TreeNode<T> | undefined, value: T): TreeNode<T> {
    if (!node) return new TreeNode(value);
    if (value < node.value) {
      node.left = this.place(node.left, value);
    } else {
      node.right = this.place(node.right, value);
    }
    return node;
  }
}

const tree = new SortedTree<number>();
[5, 2, 8].forEach((n) => tree.insert(n));
